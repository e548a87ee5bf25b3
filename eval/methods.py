"""Methods as the command line names them, and which are swept when none is named."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import METHODS, method_class
from rope_scaling.hf.loading import DEMO


UNPATCHED = "unpatched"
CROPPING = "cropping"
"""The two baselines of every table."""


@dataclass(frozen=True)
class MethodSpec:
    """A method to evaluate: how it is called in tables, and what goes to `patch`."""

    label: str
    name: str
    arguments: dict[str, Any]


def parse_method(text: str) -> MethodSpec:
    """Reads `name`, `name:field=value,field=value` with JSON values, or `name:{...}` with a JSON object of fields.

    Raises:
        RopeScalingError: the name is unknown, or what follows it is in neither form.
    """
    name, _, rest = text.partition(":")
    method_class(name)
    arguments: dict[str, Any] = {}
    if rest.startswith("{"):
        try:
            return MethodSpec(name, name, json.loads(rest))
        except json.JSONDecodeError as error:
            raise RopeScalingError(f"Method {text!r}: what follows the name is no JSON object: {error}.") from error
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
    return MethodSpec(text, name, arguments)


def default_methods(model: str) -> list[MethodSpec]:
    """Every method that needs no more than a factor, and those that wrap or need a list with values that suit.

    Args:
        model (`str`): Name of the model; the embedded one comes with LongRoPE factors searched for it.
    """
    specs = []
    for name, cls in METHODS.items():
        needed = {field.name for field in fields(cls) if field.default is MISSING} - {"factor"}
        if name == "resonance":
            specs.append(MethodSpec("resonance(yarn)", name, {"wrapped": "yarn"}))
        elif name == "longrope" and model == DEMO:
            specs.append(MethodSpec(name, name, {"long_factor": demo_longrope_factors()}))
        elif not needed:
            specs.append(MethodSpec(name, name, {}))
    return specs


def demo_longrope_factors() -> list[float]:
    """LongRoPE factors of the embedded model for 8x, found by `recipes/search_longrope.py`."""
    file = resources.files("rope_scaling.demo") / "longrope.json"
    return json.loads(file.read_text(encoding="utf-8"))["long_factor"]
