"""Arguments of the modules in `metrics/`, which 🤗 evaluate loads one by one: they cannot import each other."""

from __future__ import annotations

from collections.abc import Iterable


_ARGUMENTS = {"nlls", "trained_length", "lengths", "seed", "predictions", "references", "match", "groups"}


def check_arguments(others: Iterable[str]) -> None:
    """Raises `ValueError` for arguments that no module takes; `evaluate.combine` gives each module those of all."""
    if unknown := set(others) - _ARGUMENTS:
        raise ValueError(f"Unknown arguments: {', '.join(sorted(unknown))}.")
