"""Methods as the command line names them, and which are swept when none is named."""

from __future__ import annotations

import json
import math
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib import resources
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.describe import method_text
from rope_scaling.hf.loading import DEMO
from rope_scaling.hf.patch import patched
from rope_scaling.hf.pretrained import RECORD_KEY
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.methods import METHODS, Method, make_method, method_class, required_fields
from rope_scaling.temperatures import Temperature


UNPATCHED = "unpatched"
CROPPING = "cropping"
"""The two baselines of every table."""

_LONGEST_LABEL = 40
_TOGETHER = re.compile(r"\+(?=[a-z_]\w*(?:[:+]|$))")
"""A `+` before the name of a method, and not within a number."""


@dataclass(frozen=True)
class MethodSpec:
    """A method, or several that go together, to evaluate: how it is called in tables, and what goes to `patch`."""

    label: str
    method: str | tuple[Method | tuple[str, dict[str, Any]], ...]
    """A name, or method objects and names with their arguments."""
    arguments: dict[str, Any]
    """Of the name, or beside the objects."""

    def patched(self, model: Any, factor: float) -> AbstractContextManager[Any]:
        """The model under this method, with `factor` for those that are made for one and bring none."""
        if self.method == UNPATCHED:
            return nullcontext(model)
        return patched(model, *self.methods(factor), **self.patch_arguments(factor))

    def methods(self, factor: float) -> list[Any]:
        """What `patch` takes as methods."""
        if isinstance(self.method, str):
            return [self.method]
        return [_made(part, factor) if isinstance(part, tuple) else part for part in self.method]

    def patch_arguments(self, factor: float) -> dict[str, Any]:
        """Keyword arguments for `patch`, with `factor` unless the method brings its own extent or needs none."""
        if isinstance(self.method, str) and not {"factor", "target_length"} & self.arguments.keys():
            cls = method_class(self.method)
            if issubclass(cls, FrequencyMethod) or "factor" in required_fields(cls):
                return {**self.arguments, "factor": factor}
        return self.arguments


def _made(part: tuple[str, dict[str, Any]], factor: float) -> Method:
    name, arguments = part
    known = {field.name for field in fields(method_class(name))}
    return make_method(name, **({"factor": factor} if "factor" in known else {}) | arguments)


def saved_method(model: Any) -> MethodSpec | None:
    """The method that a model was saved with, or `None`; `unpatch` then gives the model that it was made from."""
    record = getattr(rotary_slots(model)[0].config, RECORD_KEY, None)
    if record is None:
        return None
    methods = tuple(method_from_record(one) for one in check_record(record)["methods"])
    extent = {"target_length": record["target_length"], "layer_types": record["layer_types"]}
    original = record["original_max_position_embeddings"]
    label = " + ".join(map(method_text, methods))
    return MethodSpec(f"saved {label}", methods, extent | {"original_max_position_embeddings": original})


def parse_method(text: str) -> MethodSpec:
    """Reads `name`, `name:field=value,field=value` with JSON values, or `name:{...}` with a JSON object of fields.
    Several that go together are joined by `+`, as in `self_extend:group_size=8+log_n`.

    Raises:
        RopeScalingError: a name is unknown, or what follows it is in neither form.
    """
    if text == UNPATCHED:
        return MethodSpec(UNPATCHED, UNPATCHED, {})
    # A long list of factors is no name for a line of a table.
    names = "+".join(part.partition(":")[0] for part in _TOGETHER.split(text))
    label = text if len(text) <= _LONGEST_LABEL else f"{names}:{sha256(text.encode()).hexdigest()[:6]}"
    parts = tuple(_parse_part(part) for part in _TOGETHER.split(text))
    return MethodSpec(label, *parts[0]) if len(parts) == 1 else MethodSpec(label, parts, {})


def _parse_part(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    known = [field.name for field in fields(method_class(name))]
    arguments = parse_arguments(text, rest)
    for taken in {"model", "method"} & arguments.keys():  # what `patch` itself calls its first two
        raise unknown_name(f"argument of {name!r}:", taken, known)
    return name, arguments


def parse_arguments(text: str, rest: str) -> dict[str, Any]:
    """What follows a name on the command line: `field=value,field=value` with JSON values, or a JSON object.

    Raises:
        RopeScalingError: it is neither; the message quotes `text`.
    """
    return _json_arguments(text, rest) if rest.startswith("{") else _plain_arguments(text, rest)


def _json_arguments(text: str, rest: str) -> dict[str, Any]:
    try:
        return json.loads(rest)
    except json.JSONDecodeError as error:
        raise RopeScalingError(f"{text!r}: what follows the name is no JSON object: {error}.") from error


def _plain_arguments(text: str, rest: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise RopeScalingError(f"{text!r}: {part!r} is not `field=value`. Write it as in `yarn:beta_fast=16`.")
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
    searched = demo_longrope() if model == DEMO else {}
    for name, cls in METHODS.items():
        needed = set(required_fields(cls)) - {"factor"}
        if name == "resonance":
            specs.append(MethodSpec("resonance(yarn)", name, {"wrapped": "yarn"}))
        elif "long_factor" in needed:
            if factor == searched.get("factor"):
                specs.append(MethodSpec(name, name, {"long_factor": searched["long_factor"]}))
        elif name == "self_extend":
            specs.append(self_extend_to(factor))
        elif not needed and not issubclass(cls, Temperature):
            specs.append(MethodSpec(name, name, {}))
    return specs


def self_extend_to(factor: float) -> MethodSpec:
    """Self-Extend in groups that reach a length: G (L0 - w) + w with the default window of half the trained length."""
    return parse_method(f"self_extend:group_size={max(math.ceil(2 * factor), 2)}")


def check_extent(model: Any, specs: list[MethodSpec], factor: float) -> None:
    """Refuses a factor that somebody asked for and a method would not be measured at.

    Raises:
        RopeScalingError: a method brings another factor, or its context with these settings is shorter.
    """
    for spec in specs:
        own = spec.arguments.get("factor", factor)
        if own != factor:
            raise RopeScalingError(
                f"The factor is {factor:g}, but {spec.label!r} brings its own. Give one of the two: leave `--factor` "
                "and `--target-length` out, or the method's factor."
            )
        with patched(model, *spec.methods(factor), **{"factor": factor, **spec.arguments}):
            pass


def with_yarn(specs: list[MethodSpec], factor: float) -> list[MethodSpec]:
    """The methods, with YaRN at the same factor before them unless it is there: no table is without it."""
    if factor <= 1 or any(spec.label == "yarn" for spec in specs):
        return specs
    return [MethodSpec("yarn", "yarn", {}), *specs]


def demo_longrope() -> dict[str, Any]:
    """LongRoPE factors of the embedded model and the factor they are for, found by `recipes/search_longrope.py`."""
    file = resources.files("rope_scaling.demo") / "longrope.json"
    return json.loads(file.read_text(encoding="utf-8"))
