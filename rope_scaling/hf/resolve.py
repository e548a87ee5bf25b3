"""From what a user writes to a method object, a target length and the slots they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from rope_scaling.errors import RopeScalingError, check_length, check_number, unknown_name
from rope_scaling.frequencies import FrequencyMethod, make_method, method_class
from rope_scaling.hf.pretrained import factor_of
from rope_scaling.hf.rotary import Slot


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


def resolve_method(
    method: str | FrequencyMethod | Sequence[FrequencyMethod],
    reach: int,
    factor: float | None,
    target_length: int | None,
    arguments: dict[str, Any],
) -> tuple[FrequencyMethod, int | None]:
    """A method object and, where it is given apart from the method, the target length.

    Args:
        reach (`int`): Tokens that the model reads as it arrives, which `factor` multiplies.

    Raises:
        RopeScalingError: unknown names, both or neither of factor and length, or values that are not allowed.
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
    if isinstance(method, str):
        made = _make_method(method, wanted, arguments)
    else:
        made = _single_method(method)
        if arguments:
            raise RopeScalingError(
                f"{', '.join(f'`{name}`' for name in arguments)}: a method object carries its own fields; "
                f"set them there, as in `{type(made).__name__}(...)`."
            )
        if factor is not None and getattr(made, "factor", factor) not in (None, factor):
            raise RopeScalingError(
                f"`factor` is {factor:g}, but the method object has {factor_of(made):g}. Give one of the two."
            )
    if target_length is None and factor is not None:
        target_length = int(reach * factor)
    return made, target_length


def _make_method(name: str, factor: float | None, arguments: dict[str, Any]) -> FrequencyMethod:
    inner = arguments.get("wrapped", name)
    cls = method_class(inner if isinstance(inner, str) else name)
    factors = [field for field in fields(cls) if field.name == "factor"]
    if factors and factor is not None:
        arguments = {**arguments, "factor": factor}
    elif factors and factors[0].default is MISSING:
        method_class(name)
        raise RopeScalingError(
            f"{name!r} needs to know how far: give `factor` or `target_length`, "
            f"as in `patch(model, {name!r}, factor=4)`."
        )
    return make_method(name, **arguments)


def _single_method(method: Any) -> FrequencyMethod:
    methods = list(method) if isinstance(method, (list, tuple)) else [method]
    if len(methods) != 1:
        names = ", ".join(getattr(one, "name", repr(one)) for one in methods) or "none"
        raise RopeScalingError(f"A patch holds one frequency method; got {len(methods)}: {names}.")
    if not isinstance(methods[0], FrequencyMethod):
        raise RopeScalingError(
            f"`method` must be a name such as 'yarn' or a method object such as `Yarn(factor=4)`; got {methods[0]!r}."
        )
    return methods[0]
