"""Methods as text: the fields that differ from their defaults, and the factor."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rope_scaling.methods import Method


def changed_fields(method: Method) -> dict[str, Any]:
    """The fields of a method that differ from their defaults, and those that have none."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    defaults = {field.name: field.default for field in fields(method) if field.default is not MISSING}
    made = {field.name: field.default_factory() for field in fields(method) if field.default_factory is not MISSING}
    defaults |= made
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def method_text(method: Any) -> str:
    """A method as one would write it: `yarn(factor=4)`; lists are shortened to their length."""
    fields = ", ".join(f"{name}={_value_text(value)}" for name, value in changed_fields(method).items())
    return f"{method.name or type(method).__name__}({fields})"


def _value_text(value: Any) -> str:
    if isinstance(value, Method):
        return method_text(value)
    if isinstance(value, tuple):
        return f"<{len(value)} numbers>"
    return f"{value:g}" if isinstance(value, float) else str(value)


def factor_of(method: Any) -> float:
    """How much further a method reads; 1 for one that is not made for a length."""
    return getattr(method, "factor", None) or 1.0
