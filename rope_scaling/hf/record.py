"""The readable record of a patch that rides along in the config, and the way back from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rope_scaling.errors import RopeScalingError, is_number
from rope_scaling.methods import METHODS, Method, make_method, to_dict


ACTIVATION_KEYS = ("hidden_act", "activation_function")
"""Names under which configs state the activation function."""
FORMAT = 3
"""Of the record. Format 2 wrote infinite numbers of a list as `null`."""
_KEYS = {"format", "methods", "target_length", "layer_types", "original_max_position_embeddings", "pretrained"}


def method_from_record(record: Any) -> Method:
    """The method that a record holds as plain data.

    Raises:
        RopeScalingError: the record is not one, or names a method or field that this version does not know.
    """
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise RopeScalingError(f"A method's record must be a mapping with a `name`; got {record!r}.")
    if record["name"] not in METHODS:
        raise RopeScalingError(
            f"Unknown method {record['name']!r} in the config's record of the patch. If it is a custom one, add it "
            f"first: `rope_scaling.METHODS[{record['name']!r}] = YourMethod`."
        )
    return make_method(record["name"], **{key: value for key, value in record.items() if key != "name"})


method_to_record = to_dict


def make_record(
    methods: Sequence[Method],
    target_length: int | None,
    layer_types: list[str] | None,
    original_length: int | None,
    pretrained: dict[str, Any],
) -> dict[str, Any]:
    """The record of a whole patch, as plain data that a config can hold."""
    return {
        "format": FORMAT,
        "methods": [to_dict(method) for method in methods],
        "target_length": target_length,
        "layer_types": layer_types,
        "original_max_position_embeddings": original_length,
        "pretrained": pretrained,
    }


def check_record(record: Any) -> dict[str, Any]:
    """A record in the form that this version writes, from one that it can read.

    Raises:
        RopeScalingError: it is not a record, or one of a later format.
    """
    if not isinstance(record, dict) or set(record) != _KEYS:
        raise RopeScalingError(
            f"The config's patch record is damaged: it must have {', '.join(sorted(_KEYS))}; got {record!r}."
        )
    if record["format"] not in (2, FORMAT):
        raise RopeScalingError(
            f"The config's patch record has format {record['format']!r}; this version reads 2 and {FORMAT}. Update "
            "rope-scaling."
        )
    if damage := _damage(record):
        raise RopeScalingError(f"The config's patch record is damaged: {damage}.")
    if record["format"] == FORMAT:
        return record
    return {**record, "format": FORMAT, "methods": [_from_format_2(method) for method in record["methods"]]}


def _from_format_2(value: Any) -> Any:
    """Plain data of a method with infinity in place of `null` in lists."""
    if isinstance(value, dict):
        return {key: _from_format_2(item) for key, item in value.items()}
    return ["inf" if item is None else item for item in value] if isinstance(value, list) else value


def _damage(record: dict[str, Any]) -> str:
    """What is wrong with the values of a record, or nothing."""
    methods, types, pretrained = record["methods"], record["layer_types"], record["pretrained"]
    if not isinstance(methods, list) or not 0 < len(methods) <= len(METHODS):
        return f"`methods` must be a list of methods; it is {methods!r:.100}"
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in methods):
        return f"every one of `methods` must have a `name`; they are {methods!r:.100}"
    if types is not None and not (isinstance(types, list) and all(isinstance(one, str) for one in types)):
        return f"`layer_types` must be a list of names; it is {types!r:.100}"
    if not isinstance(pretrained, dict) or not isinstance(pretrained.get("rope_parameters"), dict):
        return f"`pretrained` must hold `rope_parameters`; it is {pretrained!r:.100}"
    if not pretrained.keys() <= {"max_position_embeddings", "rope_parameters", *ACTIVATION_KEYS}:
        return f"`pretrained` holds what no patch changes: {', '.join(sorted(map(str, pretrained)))}"
    lengths = {name: record[name] for name in ("target_length", "original_max_position_embeddings")}
    lengths["max_position_embeddings"] = pretrained.get("max_position_embeddings")
    for name, length in lengths.items():
        if length is not None and (not is_number(length) or not 1 <= length <= 2**40 or length != int(length)):
            return f"`{name}` must be a whole number of tokens; it is {length!r:.100}"
    parameters = pretrained["rope_parameters"]
    labels = sorted(str(label) for label, part in parameters.items() if isinstance(part, dict))
    if labels and not (types and set(types) <= set(labels)):
        return f"`layer_types` must name some of {', '.join(labels)}; it is {types!r:.100}"
    if not labels and types is not None:
        return f"`layer_types` must be null, because all layers rotate alike; it is {types!r:.100}"
    for part in [parameters[label] for label in labels] or [parameters]:
        if not is_number(part.get("rope_theta")) or not 0 < part["rope_theta"] < 1e30:
            return f"`rope_theta` must be a number above 0; it is {part.get('rope_theta')!r:.100}"
        if not isinstance(part.get("rope_type", "default"), str):
            return f"`rope_type` must be a name; it is {part['rope_type']!r:.100}"
    return ""
