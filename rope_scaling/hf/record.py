"""The readable record of a patch that rides along in the config, and the way back from it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod, make_method


_FORMAT = 1
_KEYS = {"format", "method", "target_length", "layer_types", "original_max_position_embeddings", "pretrained"}


def method_to_record(method: FrequencyMethod) -> dict[str, Any]:
    """A method as plain data: its name and every field that is set."""
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    nested = {name: method_to_record(value) for name, value in values.items() if isinstance(value, FrequencyMethod)}
    lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {
        "name": method.name,
        **{name: value for name, value in (values | nested | lists).items() if value is not None},
    }


def method_from_record(record: Any) -> FrequencyMethod:
    """The method that `method_to_record` wrote.

    Raises:
        RopeScalingError: the record is not one, or names a method or field that this version does not know.
    """
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise RopeScalingError(f"A method's record must be a mapping with a `name`; got {record!r}.")
    arguments = {key: value for key, value in record.items() if key != "name"}
    if isinstance(arguments.get("wrapped"), dict):
        arguments["wrapped"] = method_from_record(arguments["wrapped"])
    return make_method(record["name"], **arguments)


def make_record(
    method: FrequencyMethod,
    target_length: int,
    layer_types: list[str] | None,
    original_length: int | None,
    pretrained: dict[str, Any],
) -> dict[str, Any]:
    """The record of a whole patch, as plain data that a config can hold."""
    return {
        "format": _FORMAT,
        "method": method_to_record(method),
        "target_length": target_length,
        "layer_types": layer_types,
        "original_max_position_embeddings": original_length,
        "pretrained": pretrained,
    }


def check_record(record: Any) -> dict[str, Any]:
    """`record` if this version can read it.

    Raises:
        RopeScalingError: it is not a record, or one of a later format.
    """
    if not isinstance(record, dict) or set(record) != _KEYS:
        raise RopeScalingError(
            f"The config's patch record is damaged: it must have {', '.join(sorted(_KEYS))}; got {record!r}."
        )
    if record["format"] != _FORMAT:
        raise RopeScalingError(
            f"The config's patch record has format {record['format']!r}; this version reads {_FORMAT}. Update "
            "rope-scaling."
        )
    return record
