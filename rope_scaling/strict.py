"""Strict data: YAML whose unknown or mistyped fields are errors that name the nearest known one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import yaml

from rope_scaling.errors import RopeScalingError


def yaml_mapping(name: str, text: str) -> dict[str, Any]:
    """YAML text as a mapping.

    Raises:
        RopeScalingError: it is none.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RopeScalingError(f"{name!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RopeScalingError(f"{name!r} must hold a mapping of fields; it holds {type(data).__name__}.")
    return data


def sentence(error: Any, owner: str, cls: type) -> str:
    """One of pydantic's errors on a dataclass in words.

    Args:
        error (`dict`): An entry of `ValidationError.errors()`.
        owner (`str`): What the fields belong to: `recipe`, `task 'copy'`.
        cls (`type`): The dataclass whose fields may be meant.
    """
    path = ".".join(map(str, error["loc"]))
    if error["type"] in _UNKNOWN:
        return str(unknown_field(path, owner, [one.name for one in dataclasses.fields(cls)]))
    if error["type"].startswith("missing"):
        return f"The {owner} lacks `{path}`."
    return f"`{path}`: {error['msg'][0].lower()}{error['msg'][1:]}; got {error['input']!r}."


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
"""What pydantic calls a field that it does not know."""


def unknown_first(errors: list[Any]) -> list[Any]:
    """Pydantic's errors with unknown fields first: a misspelt one is the reason why another is missing."""
    return sorted(errors, key=lambda error: error["type"] not in _UNKNOWN)


def unknown_field(path: str, owner: str, known: Iterable[str]) -> RopeScalingError:
    """The error for a field that is not known, with the nearest one that is."""
    near = get_close_matches(path.rpartition(".")[2], sorted(known), n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Fields: {', '.join(sorted(known)) or 'none'}."
    return RopeScalingError(f"Unknown {owner} field `{path}`. {hint}")
