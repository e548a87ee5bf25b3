"""Methods as the command line names them, and which are swept when none is named."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from hashlib import sha256
from importlib import resources
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies import METHODS, FrequencyMethod, method_class
from rope_scaling.hf.loading import DEMO
from rope_scaling.hf.pretrained import RECORD_KEY
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.hf.rotary import rotary_slots


UNPATCHED = "unpatched"
CROPPING = "cropping"
"""The two baselines of every table."""

_LONGEST_LABEL = 40


@dataclass(frozen=True)
class MethodSpec:
    """A method to evaluate: how it is called in tables, and what goes to `patch`."""

    label: str
    method: str | FrequencyMethod
    arguments: dict[str, Any]

    def patch_arguments(self, factor: float) -> dict[str, Any]:
        """Keyword arguments for `patch`, with `factor` unless the method brings its own extent."""
        if isinstance(self.method, str) and not {"factor", "target_length"} & self.arguments.keys():
            return {**self.arguments, "factor": factor}
        return self.arguments


def saved_method(model: Any) -> MethodSpec | None:
    """The method that a model was saved with, or `None`; `unpatch` then gives the model that it was made from."""
    record = getattr(rotary_slots(model)[0].config, RECORD_KEY, None)
    if record is None:
        return None
    method = method_from_record(check_record(record)["method"])
    extent = {"target_length": record["target_length"], "layer_types": record["layer_types"]}
    original = record["original_max_position_embeddings"]
    return MethodSpec(f"saved {method.name}", method, extent | {"original_max_position_embeddings": original})


def parse_method(text: str) -> MethodSpec:
    """Reads `name`, `name:field=value,field=value` with JSON values, or `name:{...}` with a JSON object of fields.

    Raises:
        RopeScalingError: the name is unknown, or what follows it is in neither form.
    """
    name, _, rest = text.partition(":")
    known = [field.name for field in fields(method_class(name))]
    arguments = _json_arguments(text, rest) if rest.startswith("{") else _plain_arguments(text, rest)
    for taken in {"model", "method"} & arguments.keys():  # what `patch` itself calls its first two
        raise unknown_name(f"argument of {name!r}:", taken, known)
    # A long list of factors is no name for a line of a table.
    short = len(text) <= _LONGEST_LABEL
    return MethodSpec(text if short else f"{name}:{sha256(text.encode()).hexdigest()[:6]}", name, arguments)


def _json_arguments(text: str, rest: str) -> dict[str, Any]:
    try:
        return json.loads(rest)
    except json.JSONDecodeError as error:
        raise RopeScalingError(f"Method {text!r}: what follows the name is no JSON object: {error}.") from error


def _plain_arguments(text: str, rest: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise RopeScalingError(
                f"Method {text!r}: {part!r} is not `field=value`. Write it as in `yarn:beta_fast=16`."
            )
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
    return arguments


def default_methods(model: str, factor: float) -> list[MethodSpec]:
    """Every method that needs no more than a factor, and those that wrap or need a list with values that suit.

    Args:
        model (`str`): Name of the model; the embedded one comes with LongRoPE factors searched for it.
        factor (`float`): What the methods will be patched with; those LongRoPE factors are for one factor alone.
    """
    specs = []
    for name, cls in METHODS.items():
        needed = {field.name for field in fields(cls) if field.default is MISSING} - {"factor"}
        if name == "resonance":
            specs.append(MethodSpec("resonance(yarn)", name, {"wrapped": "yarn"}))
        elif name == "longrope":
            searched = demo_longrope()
            if model == DEMO and factor == searched["factor"]:
                specs.append(MethodSpec(name, name, {"long_factor": searched["long_factor"]}))
        elif not needed:
            specs.append(MethodSpec(name, name, {}))
    return specs


def demo_longrope() -> dict[str, Any]:
    """LongRoPE factors of the embedded model and the factor they are for, found by `recipes/search_longrope.py`."""
    file = resources.files("rope_scaling.demo") / "longrope.json"
    return json.loads(file.read_text(encoding="utf-8"))
