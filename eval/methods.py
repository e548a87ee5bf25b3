"""The methods of a table: what is patched under which label, and which methods are swept when none is named."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.loading import DEMO
from rope_scaling.hf.patch import patched
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.methods import (
    METHODS,
    Combination,
    Method,
    NamedMethod,
    from_dict,
    label,
    method_class,
    method_text,
    named_method,
    parse,
    patch_arguments,
)
from rope_scaling.notation import required_fields
from rope_scaling.temperatures import Temperature


UNPATCHED = "unpatched"
CROPPING = "cropping"
"""The two baselines of every table."""


@dataclass(frozen=True)
class MethodSpec:
    """A row of a table: its label, and what goes to `patch`."""

    label: str
    method: str | tuple[Method | NamedMethod, ...]
    """A name, or method objects and names with their fields."""
    arguments: dict[str, Any]
    """Fields of the named method as plain data, and arguments of `patch`; those of `patch` alone beside objects."""

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
        return self.patched_to(model, factor if self.takes_factor else None)

    def patched_to(self, model: Any, factor: float | None) -> AbstractContextManager[Any]:
        """The model under this method, with `factor` for the patch if there is one.

        Raises:
            RopeScalingError: as `patch`, or the method's own text gives a factor or target length.
        """
        if isinstance(self.method, str):
            method = from_dict({"name": self.method, **self.arguments})
        else:
            method = Combination(self.method, self.arguments)
        methods, arguments = patch_arguments(method, factor=factor)
        return patched(model, *methods, **arguments)


def parse_method(text: str) -> MethodSpec:
    """Reads methods as on the command line: `unpatched`, or what `rope_scaling.methods.parse` reads.

    Raises:
        RopeScalingError: as `parse`.
    """
    if text == UNPATCHED:
        return MethodSpec(UNPATCHED, UNPATCHED, {})
    return _spec(parse(text))


def _spec(method: Method | Combination) -> MethodSpec:
    methods, extent = (method.methods, method.extent) if isinstance(method, Combination) else ((method,), {})
    named = tuple(map(named_method, methods))
    if len(named) > 1:
        return MethodSpec(label(method), named, extent)
    ((name, own),) = named
    return MethodSpec(label(method), name, own | extent)


def saved_method(model: Any) -> MethodSpec | None:
    """The method that a model was saved with, or `None`; `unpatch` then gives the model that it was made from."""
    record = getattr(rotary_slots(model)[0].config, RECORD_KEY, None)
    if record is None:
        return None
    record = check_record(record)
    methods = tuple(method_from_record(method) for method in record["methods"])
    extent = {name: record[name] for name in ("target_length", "layer_types", "original_max_position_embeddings")}
    return MethodSpec(f"saved {' + '.join(map(method_text, methods))}", methods, extent)


def default_methods(model: str, factor: float) -> list[MethodSpec]:
    """Every method that needs no more than a factor, and those that need other fields which are known.

    Args:
        model (`str`): Name of the model; the embedded one comes with LongRoPE factors searched for it.
        factor (`float`): What the methods will be patched with; those LongRoPE factors are for one factor alone.
    """
    known = demo_longrope() if model == DEMO else {}
    searched = known if known.get("factor") == factor else {}
    specs = []
    for name, cls in METHODS.items():
        needed = [field for field in required_fields(cls) if field != "factor"]
        if not issubclass(cls, Temperature) and all(field in searched for field in needed):
            own = cls.sweep_fields(factor) | {field: searched[field] for field in needed}
            spec = _spec(from_dict({"name": name, **own}))
            # Searched fields are those of the model, and have no place in a label.
            specs.append(replace(spec, label=name) if needed else spec)
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
    """Self-Extend with groups large enough for `factor` trained lengths."""
    return _spec(from_dict({"name": "self_extend", **method_class("self_extend").sweep_fields(factor)}))


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
        with spec.patched_to(model, None if {"factor", "target_length"} & spec.arguments.keys() else factor):
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
