"""Every method by name, and what a name and fields have to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies import METHODS as FREQUENCY_METHODS
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.notation import field_types, required_fields
from rope_scaling.spans import SPAN_METHODS, SpanMethod
from rope_scaling.temperatures import TEMPERATURES, Temperature


Method: TypeAlias = FrequencyMethod | SpanMethod | Temperature
NamedMethod: TypeAlias = tuple[str, dict[str, Any]]
"""A method's name and fields; its factor may be left to the patch."""

METHODS: dict[str, type[Method]] = {**FREQUENCY_METHODS, **SPAN_METHODS, **TEMPERATURES}
"""Every method that there is. A custom one that is added here can be given by name and restored from a checkpoint."""
ALIASES = {"proportional": "p_rope"}
"""Other names of the same method; `proportional` is Transformers' name."""


def method_name(name: str) -> str:
    """The name of a method in `METHODS`, from one in any case and spelling: `YaRN`, `Self-Extend`, `NTK-by-parts`.

    Raises:
        RopeScalingError: there is no such method; the message names the nearest.
    """
    names = {known: known for known in METHODS} | ALIASES
    if name in names:
        return names[name]
    alike = {_letters(known): known for known in names}
    if (known := alike.get(_letters(name))) is None:
        raise unknown_name("method", name, names)
    return names[known]


def _letters(name: str) -> str:
    return re.sub(r"[_\s-]", "", name.lower())


def method_class(name: str) -> type[Method]:
    """The method of that name, in any case and spelling.

    Raises:
        RopeScalingError: there is no such method; the message names the nearest.
    """
    return METHODS[method_name(name)]


def takes_factor(cls: type[Method]) -> bool:
    """Whether a method has a field for the factor of a patch."""
    return "factor" in field_types(cls)


def scaled_part(name: str, arguments: Mapping[str, Any]) -> NamedMethod:
    """The method that a factor is for, and its fields: the wrapped one, where that is given by name."""
    wrapped_field = method_class(name).wrapped_field
    inner = arguments.get(wrapped_field)
    if not isinstance(inner, str):
        return name, dict(arguments)
    return scaled_part(inner, {key: value for key, value in arguments.items() if key != wrapped_field})


def check_names(name: str, cls: type[Method], arguments: Mapping[str, Any]) -> None:
    """Raises `RopeScalingError` for a field that a method does not have; the message names the nearest."""
    known = field_types(cls)
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of {name!r}:", argument, known or ["(none)"])


def check_complete(name: str, cls: type[Method], arguments: Mapping[str, Any]) -> None:
    """Raises `RopeScalingError` if a field is missing that has no default."""
    missing = [required for required in required_fields(cls) if required not in arguments]
    given = {key: value for key, value in arguments.items() if value is not None}
    if missing:
        listed = ", ".join(f"`{required}`" for required in missing)
        raise RopeScalingError(f"{name!r} needs {listed}; got {given or 'nothing'}.")


def factor_of(method: Any) -> float:
    """How many times further a method reads; 1 for one that is not made for a length."""
    return getattr(method, "factor", None) or 1.0
