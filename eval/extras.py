"""Packages of an extra, looked for before anything that needs them is imported."""

from __future__ import annotations

import importlib.util

from rope_scaling.errors import RopeScalingError


def need(what: str, extra: str, *packages: str) -> None:
    """Raises `RopeScalingError`, with the extra to install, if one of its packages is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RopeScalingError(f"{what} needs {' and '.join(missing)}: pip install 'rope-scaling[{extra}]'.")
