"""How a method is written: as text, `yarn:factor=4,beta_fast=16`, and as plain data, `{"name": "yarn", "factor": 4}`.

Nothing here knows a particular method; `rope_scaling.methods` has the registry, and reads what is written here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar

from rope_scaling.errors import RopeScalingError
from rope_scaling.lengths import has_unit, tokens


class MethodBase:
    """What every kind of method has: a name, a text form, and hooks for what depends on the method elsewhere."""

    name: ClassVar[str] = ""
    wrapped_field: ClassVar[str] = ""
    """The field that holds another method, if this one is computed on top of it: that method's fields may be given
    beside its name, as in `resonance:wrapped=yarn,factor=4`."""
    nearest_static: ClassVar[str] = "yarn"
    """The frequency method to use where attention cannot be changed, such as on a server."""

    @classmethod
    def sweep_fields(cls, factor: float) -> dict[str, Any]:
        """Fields, as plain data, that a sweep over all methods sets beyond the factor.

        Args:
            factor (`float`): Target length over trained length of the sweep.
        """
        return {}

    def __str__(self) -> str:
        """The method as text, which `rope_scaling.methods.parse` reads back to an equal method."""
        return write_method(self.written_name, changed_fields(self))

    @property
    def written_name(self) -> str:
        """The name, or that of the class for a method that has none."""
        return self.name or type(self).__name__


# Plain data --------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A field's value as JSON and YAML take it: methods as mappings, tuples as lists, infinity as `"inf"`."""
    if isinstance(value, MethodBase):
        return plain_method(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def plain_method(method: Any) -> dict[str, Any]:
    """A method's name and every field, without those that are `None` by default and unchanged."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    left_out = {field.name for field in fields(method) if field.default is None and values[field.name] is None}
    given = {name: plain(value) for name, value in values.items() if name not in left_out}
    return {"name": method.written_name, **given}


def changed_fields(method: Any) -> dict[str, Any]:
    """The fields of a method that differ from their defaults, and those that have none."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    defaults = {field.name: _default(field) for field in fields(method)}
    return {name: value for name, value in values.items() if defaults[name] is MISSING or value != defaults[name]}


def required_fields(cls: Any) -> list[str]:
    """The fields of a method that have no default."""
    return [field.name for field in fields(cls) if _default(field) is MISSING]


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def field_types(cls: Any) -> dict[str, str]:
    """The fields of a method by name, with their types as they are written."""
    return {field.name: str(field.type) for field in fields(cls)}


def field_value(cls: Any, name: str, value: Any) -> Any:
    """Plain data as the value of a field: lists as tuples; `"inf"`, `"1e6"` and `"32k"` as numbers, except as text."""
    return _value(name, value, is_text="str" in field_types(cls).get(name, ""))


def _value(name: str, value: Any, is_text: bool, depth: int = 0) -> Any:
    if isinstance(value, list) and depth < _DEEPEST:
        return tuple(_value(name, item, is_text, depth + 1) for item in value)
    if is_text or not isinstance(value, str):
        return value
    if value in ("inf", "-inf") or _EXPONENT.fullmatch(value):  # YAML takes the second for text
        return float(value)
    return tokens(name, value) if has_unit(value) else value


_DEEPEST = 8
"""Lists within lists that are read as tuples; damaged files may have hundreds."""
_EXPONENT = re.compile(r"-?\d+(\.\d*)?[eE][+-]?\d+")


# Text --------------------------------------------------------------------------------------------------------------


def write_method(name: str, values: dict[str, Any], exact: bool = True) -> str:
    """A name and fields as text: `yarn:factor=4,beta_fast=16`.

    Args:
        name (`str`): The method's name.
        values (`dict[str, Any]`): Fields, as a method has them or as plain data.
        exact (`bool`): Write every value so that it can be read back. Otherwise numbers are rounded to six digits, and
            of long lists only the length is shown.
    """
    text = ",".join(f"{field}={_value_text(value, exact)}" for field, value in values.items())
    return f"{name}:{text}" if text else name


def _value_text(value: Any, exact: bool) -> str:
    if isinstance(value, MethodBase):
        return f"({write_method(value.written_name, changed_fields(value), exact)})"
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return f"({write_method(value['name'], {key: item for key, item in value.items() if key != 'name'}, exact)})"
    if isinstance(value, tuple | list):
        if not exact and len(value) > _FEW:
            return f"<{len(value)} values>"
        return f"[{','.join(_value_text(item, exact) for item in value)}]"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if not exact or float(short) == value else repr(value)
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value not in _NOT_BARE else json.dumps(value)
    return json.dumps(value)


_BARE = re.compile(r"[A-Za-z_][\w-]*|[\d.]+x")
"""A text value that needs no quotes."""
_NOT_BARE = {"true", "false", "null", "NaN", "Infinity"}
_FEW = 3
"""Items of a list that are shown; more are counted."""


def read_fields(text: str, rest: str) -> dict[str, Any]:
    """What follows a name: `field=value,field=value`, or a JSON object of fields.

    A value is JSON, a word, a list of values in brackets, or a method in parentheses, which stays text within them.

    Args:
        text (`str`): The whole, for messages.
        rest (`str`): What follows the name and its colon.

    Raises:
        RopeScalingError: it is in neither form.
    """
    if rest.startswith("{"):
        return _json_object(text, rest)
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in split(text, rest, ","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise RopeScalingError(f"{text!r}: {part!r} is not `field=value`. Write it as in `yarn:beta_fast=16`.")
        values[name.strip()] = _read_value(text, value.strip())
    return values


class Nested(str):
    """The text of a method that is the value of a field."""


def _read_value(text: str, value: str) -> Any:
    if value.startswith("(") and value.endswith(")"):
        return Nested(value[1:-1])
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        pass
    if value.startswith("[") and value.endswith("]"):
        return [_read_value(text, item.strip()) for item in split(text, value[1:-1], ",")]
    return value


def _json_object(text: str, rest: str) -> dict[str, Any]:
    try:
        return json.loads(rest)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RopeScalingError(f"{text!r}: what follows the name is not a JSON object: {error}.") from error


def split(text: str, part: str, separator: str) -> list[str]:
    """`part` of `text` at every separator that is outside brackets and quotes.

    A `+` separates methods where a name follows it, and belongs to a number otherwise.

    Raises:
        RopeScalingError: brackets or quotes are not closed.
    """
    pieces, depth, start = [], 0, 0
    for index, character in _outside_quotes(text, part):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            break
        if character == separator and depth == 0 and (separator != "+" or _NAME_FOLLOWS.match(part, index + 1)):
            pieces.append(part[start:index])
            start = index + 1
    if depth:
        raise RopeScalingError(f"{text!r}: brackets are not closed, or closed twice.")
    return [*pieces, part[start:]]


_NAME_FOLLOWS = re.compile(r"\s*[A-Za-z_]")


def _outside_quotes(text: str, part: str) -> Iterator[tuple[int, str]]:
    quoted = escaped = False
    for index, character in enumerate(part):
        if not quoted and character != '"':
            yield index, character
        if character == '"' and not escaped:
            quoted = not quoted
        escaped = quoted and character == "\\" and not escaped
    if quoted:
        raise RopeScalingError(f"{text!r}: a quotation mark is not closed.")


def from_calls(text: str) -> str:
    """What rows say of a method, from the calls that earlier versions wrote: `yarn(factor=4, beta_fast=16)`."""
    while (innermost := re.sub(r"(=?)(\w+)\(([^()]*)\)", _from_call, text)) != text:
        text = innermost
    return text.replace("\0", "(").replace("\1", ")").replace(" numbers>", " values>")


def _from_call(call: re.Match[str]) -> str:
    equals, name, values = call.groups()
    text = f"{name}:{values.replace(', ', ',')}" if values else name
    return f"=\0{text}\1" if equals else text
