"""From what a user writes to a method object, a target length and the slots they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rope_scaling.errors import RopeScalingError, check_length, check_number, unknown_name
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.rotary import Slot
from rope_scaling.methods import Method, NamedMethod, make_scaled
from rope_scaling.spans import SpanMethod
from rope_scaling.temperatures import Temperature


def choose_slots(slots: list[Slot], wanted: str | Sequence[str] | None) -> list[Slot]:
    """The slots to scale: full attention unless told otherwise, in models whose layer types rotate differently.

    Raises:
        RopeScalingError: an unknown layer type, or any in a model whose layers all rotate alike.
    """
    names = sorted({slot.layer_type for slot in slots if slot.layer_type})
    if not names:
        if wanted not in (None, "all"):
            raise RopeScalingError(
                f"`layer_types` is {wanted!r}, but all layers of this model rotate alike. Leave it out."
            )
        return slots
    if wanted is None:
        chosen = [name for name in names if "full" in name] or names
    elif wanted == "all":
        chosen = names
    else:
        chosen = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in chosen:
            if name not in names:
                raise unknown_name("layer type", name, names)
    return [slot for slot in slots if slot.layer_type in chosen]


@dataclass(frozen=True)
class Resolved:
    """What one patch consists of."""

    frequency: FrequencyMethod | None
    spans: tuple[SpanMethod, ...]
    temperature: Temperature | None
    target_length: int | None
    """In tokens, where it is given apart from the methods."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """All of them, the frequency method first."""
        return tuple(method for method in (self.frequency, *self.spans, self.temperature) if method is not None)


def resolve_methods(
    given: Sequence[str | Method | NamedMethod | Sequence[Method]],
    reach: int,
    factor: float | None,
    target_length: int | None,
    arguments: dict[str, Any],
) -> Resolved:
    """Method objects and, where it is given apart from them, the target length.

    Args:
        given (sequence): One name, or any number of method objects, lists of them, and `(name, fields)` pairs. A pair
            whose method takes a factor and whose fields hold none gets that of the patch.
        reach (`int`): Tokens that the model reads as it arrives, which `factor` multiplies.

    Raises:
        RopeScalingError: unknown names, both or neither of factor and length, methods that decide the same, or values
            that are not allowed.
    """
    if factor is not None and target_length is not None:
        raise RopeScalingError(
            f"Give `factor` or `target_length`, not both; got factor={factor!r} and target_length={target_length!r}."
        )
    if factor is not None:
        check_number("factor", factor, at_least=1.0)
    if target_length is not None:
        target_length = check_length("target_length", target_length)
        if target_length < reach:
            raise RopeScalingError(
                f"`target_length` is {target_length}, but the model reads {reach} tokens as it is; "
                f"give at least {reach}."
            )
    wanted = factor if factor is not None else target_length / reach if target_length is not None else None
    if len(given) == 1 and isinstance(given[0], str):
        methods = [make_scaled(given[0], wanted, arguments)]
    else:
        methods = _method_objects(given, wanted)
        if arguments:
            names = ", ".join(f"`{name}`" for name in arguments)
            raise RopeScalingError(
                f"{names}: a method object carries its own fields; set them there, as in "
                f"`{type(methods[0]).__name__}(...)`."
            )
        own: Any = next((found for method in methods if (found := getattr(method, "factor", None))), None)
        if factor is not None and own not in (None, factor):
            raise RopeScalingError(f"`factor` is {factor:g}, but the method has {own:g}. Give one of the two.")
    if target_length is None and factor is not None:
        target_length = int(reach * factor)
    return resolved(methods, target_length)


def resolved(methods: Sequence[Method], target_length: int | None) -> Resolved:
    """Sorts methods by what they decide.

    Raises:
        RopeScalingError: two of them decide the same.
    """
    taken: dict[str, Method] = {}
    for method in methods:
        for what in _decides(method):
            if what in taken:
                both = f"{_name(taken[what])} and {_name(method)}"
                raise RopeScalingError(
                    f"{both} both decide {_WHAT[what]}, so they cannot be combined. Give one of them."
                )
            taken[what] = method
    spans = tuple(method for method in methods if isinstance(method, SpanMethod))
    frequency = next((method for method in methods if isinstance(method, FrequencyMethod)), None)
    temperature = next((method for method in methods if isinstance(method, Temperature)), None)
    return Resolved(frequency, spans, temperature, target_length)


_WHAT = {
    "frequency": "the frequencies",
    "map": "the distances at which keys are seen",
    "window": "which keys are seen",
    "temperature": "the temperature",
}


def _decides(method: Method) -> frozenset[str]:
    return frozenset({"frequency"}) if isinstance(method, FrequencyMethod) else method.decides


def _name(method: Any) -> str:
    return getattr(method, "name", "") or type(method).__name__


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)


def _method_objects(given: Sequence[Any], factor: float | None) -> list[Method]:
    made = [make_scaled(item[0], factor, item[1]) if _is_named(item) else item for item in given]
    flat = [one for item in made for one in (item if isinstance(item, (list, tuple)) else [item])]
    for one in flat:
        if isinstance(one, str) and len(flat) > 1:
            raise RopeScalingError(
                f"A name stands for one method with its arguments; got {one!r} beside others. Give objects, as in "
                "`patch(model, Yarn(factor=2), SlidingWindow(window=1024))`."
            )
        if not isinstance(one, Method):
            raise RopeScalingError(
                "`method` must be a name such as 'yarn' or a method object such as `Yarn(factor=4)`; got "
                f"{one if not isinstance(one, type) else one.__name__!r}."
            )
    if not flat:
        raise RopeScalingError("No method given. Name one, as in `patch(model, 'yarn', factor=4)`.")
    return flat
