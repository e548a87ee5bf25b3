"""The arguments of `patch`: methods, target length, layer types. They know no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rope_scaling.errors import RopeScalingError, check_length, check_number, unknown_name
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.record import method_from_record
from rope_scaling.hf.slot import Slot
from rope_scaling.methods import Method, NamedMethod, make_scaled
from rope_scaling.spans import SpanMethod
from rope_scaling.temperatures import Temperature


@dataclass(frozen=True)
class PatchArguments:
    """What is asked of a patch, before it is known for which model."""

    methods: tuple[Method | NamedMethod, ...]
    """A pair of a name and fields becomes a method once the factor is known."""
    factor: float | None = None
    target_length: int | None = None
    """In tokens."""
    layer_types: str | Sequence[str] | None = None
    original_max_position_embeddings: int | None = None
    """Trained length in tokens, where the config has none."""
    recorded: bool = False
    """Whether the model's own config records them, and has to be as they leave it."""

    @classmethod
    def parse(
        cls,
        *method: str | Method | NamedMethod | Sequence[Method],
        factor: float | None = None,
        target_length: int | None = None,
        original_max_position_embeddings: int | None = None,
        layer_types: str | Sequence[str] | None = None,
        **fields: Any,
    ) -> PatchArguments:
        """Checks the arguments of `patch` for what needs no model.

        Raises:
            RopeScalingError: both of factor and length, something that is not a method, fields beside method objects,
                or values that are not allowed.
        """
        if factor is not None and target_length is not None:
            raise RopeScalingError(
                f"Give `factor` or `target_length`, not both; got factor={factor!r} and "
                f"target_length={target_length!r}."
            )
        if factor is not None:
            check_number("factor", factor, at_least=1.0)
        if target_length is not None:
            target_length = check_length("target_length", target_length)
        if original_max_position_embeddings is not None:
            original_max_position_embeddings = check_length(
                "original_max_position_embeddings", original_max_position_embeddings
            )
        if len(method) == 1 and isinstance(method[0], str):
            methods: list[Method | NamedMethod] = [(method[0], fields)]
        else:
            methods = _flat(method)
            _check_no_fields_beside(methods, fields)
            _check_factor(methods, factor)
        return cls(tuple(methods), factor, target_length, layer_types, original_max_position_embeddings)

    @classmethod
    def from_record(cls, record: dict[str, Any], recorded: bool = False) -> PatchArguments:
        """The arguments that a record states.

        Args:
            record (`dict[str, Any]`): What `check_record` let through.
            recorded (`bool`): Whether it is that of the model's own config.

        Raises:
            RopeScalingError: it names a method or field that this version does not know.
        """
        return cls(
            tuple(method_from_record(method) for method in record["methods"]),
            target_length=record["target_length"],
            layer_types=record["layer_types"],
            original_max_position_embeddings=record["original_max_position_embeddings"],
            recorded=recorded,
        )

    def choose(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots to patch: full attention unless told otherwise, in models whose layer types rotate differently.

        Raises:
            RopeScalingError: an unknown layer type, or any in a model whose layers all rotate alike.
        """
        names = sorted({slot.layer_type for slot in slots if slot.layer_type})
        if not names:
            if self.layer_types not in (None, "all"):
                raise RopeScalingError(
                    f"`layer_types` is {self.layer_types!r}, but all layers of this model rotate alike. Leave it out."
                )
            return list(slots)
        if self.layer_types is None:
            chosen = [name for name in names if "full" in name] or names
        elif self.layer_types == "all":
            chosen = names
        else:
            chosen = [self.layer_types] if isinstance(self.layer_types, str) else list(self.layer_types)
            for name in chosen:
                if name not in names:
                    raise unknown_name("layer type", name, names)
        return [slot for slot in slots if slot.layer_type in chosen]

    def methods_for(self, context_length: int) -> PatchMethods:
        """Method objects and the target length, for a model of a given context length.

        Args:
            context_length (`int`): Context length of the model as loaded, in tokens, which `factor` multiplies.

        Raises:
            RopeScalingError: a target below that, unknown names, neither of factor and length where a method needs
                one, or methods that decide the same.
        """
        factor, target = self.factor, self.target_length
        if target is not None and target < context_length:
            raise RopeScalingError(
                f"`target_length` is {target}, but the context length as loaded is {context_length}; give at least "
                f"{context_length}."
            )
        if factor is None and target is not None:
            factor = target / context_length
        methods = [
            make_scaled(method[0], factor, method[1]) if isinstance(method, tuple) else method
            for method in self.methods
        ]
        _check_factor(methods, self.factor)
        if target is None and factor is not None:
            target = int(context_length * factor)
        return _by_what_they_decide(methods, target)


@dataclass(frozen=True)
class PatchMethods:
    """The methods of one patch, sorted by what they decide."""

    frequency: FrequencyMethod | None
    spans: tuple[SpanMethod, ...]
    temperature: Temperature | None
    target_length: int | None
    """In tokens, where it is given apart from the methods."""

    @property
    def all(self) -> tuple[Method, ...]:
        """All of them, the frequency method first."""
        return tuple(method for method in (self.frequency, *self.spans, self.temperature) if method is not None)

    @property
    def in_attention(self) -> bool:
        """Whether any of them changes attention: a span method or a temperature."""
        return bool(self.spans or self.temperature)


_WHAT = {
    "frequency": "the frequencies",
    "map": "the distances at which keys are seen",
    "window": "which keys are seen",
    "temperature": "the temperature",
}


def _by_what_they_decide(methods: Sequence[Method], target_length: int | None) -> PatchMethods:
    taken: dict[str, Method] = {}
    for method in methods:
        decides = frozenset({"frequency"}) if isinstance(method, FrequencyMethod) else method.decides
        for what in decides:
            if what in taken:
                both = f"{_name(taken[what])} and {_name(method)}"
                raise RopeScalingError(
                    f"{both} both decide {_WHAT[what]}, so they cannot be combined. Give one of them."
                )
            taken[what] = method
    spans = tuple(method for method in methods if isinstance(method, SpanMethod))
    frequency = next((method for method in methods if isinstance(method, FrequencyMethod)), None)
    temperature = next((method for method in methods if isinstance(method, Temperature)), None)
    return PatchMethods(frequency, spans, temperature, target_length)


def _name(method: Any) -> str:
    return getattr(method, "name", "") or type(method).__name__


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)


def _flat(given: Sequence[Any]) -> list[Any]:
    """Method objects and named ones, those in lists among them."""
    flat: list[Any] = []
    for item in given:
        flat += [item] if _is_named(item) or not isinstance(item, (list, tuple)) else item
    for method in flat:
        if isinstance(method, str) and len(flat) > 1:
            raise RopeScalingError(
                f"A name stands for one method with its arguments; got {method!r} beside others. Give objects, as in "
                "`patch(model, Yarn(factor=2), SlidingWindow(window=1024))`."
            )
        if not isinstance(method, Method) and not _is_named(method):
            raise RopeScalingError(
                "`method` must be a name such as 'yarn' or a method object such as `Yarn(factor=4)`; got "
                f"{method if not isinstance(method, type) else method.__name__!r}."
            )
    if not flat:
        raise RopeScalingError("No method given. Name one, as in `patch(model, 'yarn', factor=4)`.")
    return flat


def _check_no_fields_beside(methods: Sequence[Any], fields: dict[str, Any]) -> None:
    if fields:
        names = ", ".join(f"`{name}`" for name in fields)
        example = methods[0][0] if isinstance(methods[0], tuple) else type(methods[0]).__name__
        raise RopeScalingError(
            f"{names}: a method object carries its own fields; set them there, as in `{example}(...)`."
        )


def _check_factor(methods: Sequence[Any], factor: float | None) -> None:
    """Refuses method objects that have another factor than the patch."""
    stated: Any = next((value for method in methods if (value := getattr(method, "factor", None))), None)
    if factor is not None and stated not in (None, factor):
        raise RopeScalingError(f"`factor` is {factor:g}, but the method has {stated:g}. Give one of the two.")
