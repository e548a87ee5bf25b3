"""The one notation of methods: text, plain data, and arguments of `patch`.

`yarn:beta_fast=16+log_n` on the command line is `[{"name": "yarn", "beta_fast": 16}, {"name": "log_n"}]` in a recipe
and in the config of a patched model, and `str` of the methods is that text again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.lengths import multiple, tokens, tokens_or_multiple
from rope_scaling.notation import (
    Nested,
    changed_fields,
    field_types,
    field_value,
    plain,
    plain_method,
    read_fields,
    required_fields,
    split,
    write_method,
)
from rope_scaling.registry import (
    METHODS,
    Method,
    NamedMethod,
    check_complete,
    check_names,
    factor_of,
    method_class,
    method_name,
    scaled_part,
    takes_factor,
)


_EXTENT = ("factor", "target_length", "original_max_position_embeddings", "layer_types")
"""Arguments of `patch` that a method's text may give beside the method's own fields."""
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class Combination:
    """What a text names that is not one complete method: several, a method without its factor, or one with lengths."""

    methods: tuple[Method | NamedMethod, ...]
    """Method objects; those that leave their factor to the patch as pairs of a name and its fields."""
    extent: dict[str, Any] = field(default_factory=dict)
    """Arguments of `patch` (`factor`, `target_length`, ...) that are given with them; a target length in tokens, or in
    lengths that the model reads as loaded, as in `8x`."""

    def __str__(self) -> str:
        """The text that `parse` reads back to an equal combination."""
        (name, own), *others = map(_written, self.methods)
        return "+".join([write_method(name, own | self.extent), *(write_method(*other) for other in others)])


# By name and fields -------------------------------------------------------------------------------------------------


def make_method(name: str, /, **arguments: Any) -> Method:
    """A method from its name and fields, as in `make_method("yarn", factor=4)`.

    A wrapping method takes the wrapped one's name, and its fields beside it:
    `make_method("resonance", wrapped="yarn", factor=4)`.

    Args:
        name (`str`): A name in `METHODS`, in any case and spelling.
        **arguments: Fields, as the method has them or as plain data.

    Raises:
        RopeScalingError: no such method or field, a missing field, or a value that is not allowed.
    """
    cls = method_class(name)
    arguments = _nested(cls, arguments)
    inner = arguments.get(cls.wrapped_field)
    if isinstance(inner, str):
        others = {key: value for key, value in arguments.items() if key != cls.wrapped_field}
        return cls(**{cls.wrapped_field: make_method(inner, **others)})
    check_names(name, cls, arguments)
    check_complete(name, cls, arguments)
    return cls(**{key: field_value(cls, key, value) for key, value in arguments.items()})


def make_scaled(name: str, factor: float | None, arguments: Mapping[str, Any]) -> Method:
    """A method from its name and fields, with the factor of a patch if it takes one and its fields hold none.

    Args:
        name (`str`): A method's name.
        factor (`float`, *optional*): Target length over the length that the model reads as loaded.
        arguments (`dict`): The method's fields.

    Raises:
        RopeScalingError: as `make_method`, or the method needs a factor and there is none.
    """
    arguments = _nested(method_class(name), arguments)
    scaled, own = scaled_part(name, arguments)
    cls = method_class(scaled)
    if "factor" in own or not takes_factor(cls):
        return make_method(name, **arguments)
    if factor is not None:
        return make_method(name, **{"factor": factor, **arguments})
    if "factor" not in required_fields(cls):
        return make_method(name, **arguments)
    check_names(scaled, cls, own)
    raise RopeScalingError(
        f"{name!r} requires a length: give `factor` or `target_length`, as in `patch(model, {name!r}, factor=4)`."
    )


# Reading -----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Method | Combination:
    """Reads methods as text: `yarn`, `yarn:beta_fast=16`, `self_extend:group_size=8+log_n`.

    A name is one of `METHODS`, in any case and spelling. Fields follow a colon, as `field=value` with commas between
    them or as one JSON object. A value is JSON, a word, tokens such as `32k`, a list in brackets, or a method in
    parentheses, as in `alternating:local=(lm_infinite:window=1k)`. `target_length`, `original_max_position_embeddings`
    and `layer_types` may be given among the fields. Methods that go together are joined by `+`.

    Returns:
        `Method` or `Combination`: the method, if the text is one that is complete; otherwise a combination.

    Raises:
        RopeScalingError: no such method or field, or the text is in no such form.
    """
    return _combined(_text_parts(text))


def from_dict(data: Any) -> Method | Combination:
    """Reads methods as plain data: what `to_dict` gives, or what a recipe has.

    Args:
        data (`dict`, `list` or `str`): A mapping with the method's `name` and its fields; a list of these; a mapping
            with a list of `methods` and arguments of `patch`; or text, as for `parse`.

    Returns:
        `Method` or `Combination`: as of `parse`.

    Raises:
        RopeScalingError: no such method or field, or the data are in no such form.
    """
    if isinstance(data, str):
        return parse(data)
    extent: dict[str, Any] = {}
    if isinstance(data, Mapping) and "methods" in data:
        extent = {key: value for key, value in data.items() if key != "methods"}
        data = data["methods"]
    parts: list[NamedMethod] = []
    for item in data if isinstance(data, list | tuple) else [data]:
        if isinstance(item, str):
            parts += _text_parts(item)
        elif isinstance(item, Mapping) and isinstance(item.get("name"), str):
            parts.append((item["name"], {key: value for key, value in item.items() if key != "name"}))
        else:
            raise RopeScalingError(
                f"A method must be text or a mapping with a `name`, such as {{name: yarn, factor: 4}}; got {item!r}."
            )
    return _combined(parts, extent)


def _text_parts(text: str) -> list[NamedMethod]:
    """Names and fields of the methods that a text names."""
    parts = []
    for part in split(text, text, "+"):
        name, _, rest = part.strip().partition(":")
        parts.append((name, read_fields(text, rest)))
    return parts


def _combined(parts: Sequence[NamedMethod], beside: Mapping[str, Any] | None = None) -> Method | Combination:
    """Methods by name and fields, as one; `beside` has arguments of `patch` for all of them."""
    if not parts:
        raise RopeScalingError("There is no method in an empty list. Name one, such as 'yarn'.")
    read = [_read(name, values, alone=len(parts) == 1) for name, values in parts]
    extent: dict[str, Any] = {}
    for more in (_extent(beside or {}), *(own for _, own in read)):
        if twice := sorted(extent.keys() & more.keys()):
            raise RopeScalingError(f"`{twice[0]}` is given twice. Give it once.")
        extent |= more
    methods = tuple(method for method, _ in read)
    if len(methods) == 1 and isinstance(methods[0], Method) and not extent:
        return methods[0]
    return Combination(methods, extent)


def _read(name: str, values: Mapping[str, Any], alone: bool) -> tuple[Method | NamedMethod, dict[str, Any]]:
    """One method, as an object if it is complete, and what is meant for `patch` among its values."""
    name = method_name(name)
    values = _nested(METHODS[name], values)
    scaled, own = scaled_part(name, values)
    cls = method_class(scaled)
    known = field_types(cls)
    extent = {key: own[key] for key in _EXTENT if key in own and key not in known and (alone or key != "factor")}
    values, own = ({key: value for key, value in of.items() if key not in extent} for of in (values, own))
    try:
        return make_method(name, **values), _extent(extent)
    except RopeScalingError:
        if not takes_factor(cls) or "factor" in own:
            raise
    # The factor is left to the patch, which makes the method, and says what is wrong with other fields.
    check_names(scaled, cls, own)
    check_complete(scaled, cls, {"factor": None, **own})
    return (name, {key: plain(field_value(cls, key, value)) for key, value in values.items()}), _extent(extent)


def _extent(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `patch`, with lengths in tokens; `8x` stays as it is."""
    for name in given:
        if name not in _EXTENT:
            raise unknown_name("argument of a patch", str(name), _EXTENT)
    extent = {name: value for name, value in given.items() if value is not None}
    for name, read in (("target_length", tokens_or_multiple), ("original_max_position_embeddings", tokens)):
        if name in extent:
            extent[name] = read(name, extent[name])
    return extent


def _nested(cls: type[Method], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with methods in place of their text or plain data.

    A wrapped method without its factor goes by its name, and its fields beside it.
    """
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name == cls.wrapped_field and isinstance(value, str) and not isinstance(value, Nested):
            value = method_name(value)
        elif "Method" in field_types(cls).get(name, "") and isinstance(value, str | Mapping):
            value = from_dict(value)
        if isinstance(value, Combination):
            if len(value.methods) > 1 or value.extent:
                raise RopeScalingError(f"`{name}` takes one method and its fields; got '{value}'.")
            inner, own = named_method(value.methods[0])
            if name == cls.wrapped_field:
                read |= {name: inner, **own}
                continue
            value = make_method(inner, **own)  # says what is missing
        read[name] = value
    return read


# Writing -----------------------------------------------------------------------------------------------------------


def to_dict(method: Method | Combination) -> dict[str, Any]:
    """Methods as plain data, which JSON and YAML take and `from_dict` reads back to an equal method.

    Returns:
        `dict`: of a method, its `name` and every field; of a combination, its `methods` and arguments of `patch`.
    """
    if isinstance(method, Method):
        return plain_method(method)
    methods = [
        {"name": part[0], **part[1]} if isinstance(part, tuple) else plain_method(part) for part in method.methods
    ]
    return {"methods": methods, **method.extent}


def named_method(method: Method | NamedMethod) -> NamedMethod:
    """A method's name and those fields that are not the default, as plain data."""
    if isinstance(method, tuple):
        return method
    return method.written_name, {name: plain(value) for name, value in changed_fields(method).items()}


def _written(method: Method | NamedMethod) -> NamedMethod:
    return method if isinstance(method, tuple) else (method.written_name, changed_fields(method))


def label(method: Method | Combination) -> str:
    """Methods as text for a table: at full length, or their names and a hash where that would be long."""
    text = str(method)
    if len(text) <= _LONGEST_LABEL:
        return text
    methods = method.methods if isinstance(method, Combination) else (method,)
    return f"{'+'.join(_written(part)[0] for part in methods)}:{sha256(text.encode()).hexdigest()[:6]}"


def method_text(method: Method) -> str:
    """A method as text for messages: numbers rounded, and of long lists only the length."""
    return write_method(method.written_name, changed_fields(method), exact=False)


# Patching ----------------------------------------------------------------------------------------------------------


def patch_arguments(method: Method | Combination, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `patch` is called with for methods as text or plain data name them.

    Args:
        method (`Method` or `Combination`): What `parse` or `from_dict` gave.
        **given: `factor`, `target_length` (tokens, or `8x` of what the model reads as loaded) and
            `original_max_position_embeddings`; `None` is as good as nothing.

    Returns:
        Positional and keyword arguments of `patch`.

    Raises:
        RopeScalingError: a value is given here and with the method, or a length is none.
    """
    methods = method.methods if isinstance(method, Combination) else (method,)
    own = _with_factor(method.extent if isinstance(method, Combination) else {})
    if len(methods) == 1 and getattr(methods[0], "factor", None) and "target_length" not in own:
        own = {"factor": factor_of(methods[0]), **own}  # the length follows from it
    beside = _with_factor(_extent(given))
    for names in ({"factor", "target_length"}, {"original_max_position_embeddings"}):
        if (twice := sorted(names & beside.keys())) and (already := sorted(names & own.keys())):
            raise RopeScalingError(
                f"'{method}' sets `{already[0]}`, and `{twice[0]}` is given beside it. Give one of the two."
            )
    return tuple(map(_for_patch, methods)), {**own, **beside}


def _with_factor(extent: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `patch` with a factor for a target length such as `8x`."""
    factor = multiple(extent.get("target_length"))
    if factor is None:
        return dict(extent)
    if "factor" in extent:
        raise RopeScalingError("Give `factor` or `target_length`, not both.")
    return {key: value for key, value in extent.items() if key != "target_length"} | {"factor": factor}


def _for_patch(method: Method | NamedMethod) -> Method | NamedMethod:
    """A method whose factor is left to the patch goes by name, so that it gets that of the patch."""
    if isinstance(method, tuple) or METHODS.get(method.name) is not type(method):
        return method
    is_open = takes_factor(type(method)) and getattr(method, "factor", None) is None
    return (method.name, changed_fields(method)) if is_open else method
