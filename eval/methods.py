"""Methods as the command line names them, and which are swept when none is named."""

from __future__ import annotations

import json
import math
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from importlib import resources
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.loading import DEMO
from rope_scaling.hf.method_text import method_text
from rope_scaling.hf.patch import patch, patched
from rope_scaling.hf.patch_arguments import NamedMethod
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.methods import METHODS, Method, method_class, required_fields
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
    method: str | tuple[Method | NamedMethod, ...]
    """A name, or method objects and names with their arguments."""
    arguments: dict[str, Any]
    """Of the name, or beside the objects."""

    @property
    def takes_factor(self) -> bool:
        """Whether a factor meant for every method is meant for this one: it is made for one, and brings none."""
        parts = ((self.method, self.arguments),) if isinstance(self.method, str) else self.method
        named = [part for part in parts if isinstance(part, tuple)]
        if {"factor", "target_length"} & {*self.arguments, *(key for _, own in named for key in own)}:
            return False
        classes = [method_class(name) for name, _ in named]
        return any(issubclass(cls, FrequencyMethod) or "factor" in required_fields(cls) for cls in classes)

    def trained_at(self, length: int | None) -> MethodSpec:
        """With the model's trained length, in tokens, if there is one and the method's own text does not state it."""
        if length is None:
            return self
        return replace(self, arguments={"original_max_position_embeddings": length, **self.arguments})

    def patched(self, model: Any, factor: float) -> AbstractContextManager[Any]:
        """The model under this method, with `factor` for those that are made for one and bring none."""
        if self.method == UNPATCHED:
            return nullcontext(model)
        methods, arguments = self.patch_call(factor=factor if self.takes_factor else None)
        return patched(model, *methods, **arguments)

    def patch_call(self, **extent: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for `patch`: every way of patching by a text goes through here.

        Args:
            **extent: `factor`, `target_length` and `original_max_position_embeddings`, those that are `None` left out.

        Raises:
            RopeScalingError: the method's text gives one of them as well, or another extent.
        """
        given = {name: value for name, value in extent.items() if value is not None}
        for names in ({"factor", "target_length"}, {"original_max_position_embeddings"}):
            if (twice := sorted(names & given.keys())) and (own := sorted(names & self.arguments.keys())):
                raise RopeScalingError(
                    f"{self.label!r} sets `{own[0]}`, and `{twice[0]}` is given beside it. Give one of the two."
                )
        methods = (self.method,) if isinstance(self.method, str) else self.method
        return methods, {**self.arguments, **given}


def patch_by_text(model: Any, text: str, **extent: Any) -> Any:
    """Patches a model in place by a method's text, as on the command line and in recipes.

    Args:
        model (`nn.Module`): A loaded Transformers model.
        text (`str`): What `parse_method` reads: `yarn:beta_fast=16`, `yarn+log_n`.
        **extent: `factor`, `target_length` and `original_max_position_embeddings`, as `patch` takes them; `None` is as
            good as nothing.

    Returns:
        `nn.Module`: the model itself.

    Raises:
        RopeScalingError: as `parse_method` and `patch`, or the text gives an extent as well.
    """
    methods, arguments = parse_method(text).patch_call(**extent)
    return patch(model, *methods, **arguments)


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


def applicable(model: Any, specs: list[MethodSpec], factor: float) -> tuple[list[MethodSpec], dict[str, str]]:
    """Those of a sweep's methods that a model takes, and by label why it does not take the others."""
    taken, refused = [], {}
    for spec in specs:
        try:
            with spec.patched(model, factor):
                taken.append(spec)
        except RopeScalingError as error:
            refused[spec.label] = str(error)
    return taken, refused


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
        methods, arguments = spec.patch_call(
            factor=None if {"factor", "target_length"} & spec.arguments.keys() else factor
        )
        with patched(model, *methods, **arguments):
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
