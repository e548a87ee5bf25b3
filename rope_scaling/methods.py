"""Every method by name, and how one is made from a name and its fields."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeAlias

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies import METHODS as FREQUENCY_METHODS
from rope_scaling.frequencies import FrequencyMethod, Resonance
from rope_scaling.spans import SPAN_METHODS, SpanMethod
from rope_scaling.temperatures import TEMPERATURES, Temperature


Method: TypeAlias = FrequencyMethod | SpanMethod | Temperature

METHODS: dict[str, type[Method]] = {**FREQUENCY_METHODS, **SPAN_METHODS, **TEMPERATURES}
"""Every method that there is. One of your own that you add here can be given by name and restored from a
checkpoint."""
ALIASES = {"proportional": "p_rope"}
"""Other names of the same method; `proportional` is Transformers' name."""


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        RopeScalingError: there is none; the message names the nearest.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in METHODS:
        raise unknown_name("method", name, [*METHODS, *ALIASES])
    return METHODS[canonical]


def make_method(name: str, /, **arguments: Any) -> Method:
    """A method from its name and fields, as in `make_method("yarn", factor=4)`.

    A wrapping method takes the wrapped one's name as `wrapped`, and its fields beside it:
    `make_method("resonance", wrapped="yarn", factor=4)`.

    Raises:
        RopeScalingError: no such method or field, a missing field, or a value that is not allowed.
    """
    cls = method_class(name)
    if cls is Resonance and isinstance(arguments.get("wrapped"), str):
        return Resonance(wrapped=make_method(arguments.pop("wrapped"), **arguments))  # type: ignore[arg-type]
    known = [field.name for field in fields(cls)]
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of {name!r}:", argument, known or ["(none)"])
    missing = [field for field in required_fields(cls) if field not in arguments]
    if missing:
        raise RopeScalingError(
            f"{name!r} needs {', '.join(f'`{field}`' for field in missing)}; got {arguments or 'nothing'}."
        )
    return cls(**arguments)


def required_fields(cls: type[Method]) -> list[str]:
    """The fields of a method that have no default."""
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]
