"""From a pretrained slot and a method to frequencies that plain Transformers will compute alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, check_length
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.frequencies.base import longrope_parameters
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.pretrained import Pretrained, config_with, host_frequencies
from rope_scaling.hf.rotary import Slot
from rope_scaling.hf.tables import rope_parameters_of
from rope_scaling.methods import factor_of


_TOLERANCE = 2e-6
"""Relative difference that float32 arithmetic in another order may make."""


@dataclass(frozen=True)
class Extension:
    """What one slot gets, and how it was arrived at."""

    inv_freq: torch.Tensor
    """`[R / 2]`, float32, bit for bit what plain Transformers computes from `rope_parameters`."""
    attention_factor: float
    rope_parameters: dict[str, Any]
    """The slot's part of the config to save."""
    arithmetic: str
    """In words: what was multiplied with what."""


def target_length(pretrained: Pretrained, method: FrequencyMethod, given: int | None) -> int:
    """The length that a patched model is meant for, in tokens.

    Raises:
        RopeScalingError: the given length is below what the model reads already, or contradicts the method.
    """
    factor = factor_of(method)
    derived = check_length("factor times trained length", int(pretrained.reach * factor))
    if given is None:
        return derived
    if given < pretrained.reach:
        raise RopeScalingError(
            f"`target_length` is {given}, but the model reads {pretrained.reach} tokens as it is; "
            f"give at least {pretrained.reach}."
        )
    if factor > 1 and abs(given - pretrained.reach * factor) >= 1:
        raise RopeScalingError(
            f"`target_length` is {given}, but the method's factor {factor:g} times {pretrained.reach} tokens is "
            f"{derived}. Give one of the two."
        )
    return given


def extend(slot: Slot, pretrained: Pretrained, method: FrequencyMethod, length: int) -> Extension:
    """Applies a method to a slot as it arrived.

    A model without scaling gets the method as it is. One that arrives scaled by the same method gets one such method,
    with the factors multiplied and the first trained length kept. One that arrives scaled by another method keeps its
    frequencies, and they are multiplied by what the new method does to a model trained at the length it reads now.

    Raises:
        RopeScalingError: the method cannot be computed for this model, or no config could express it.
    """
    geometry = pretrained.geometry
    inv_freq, attention_factor, native, arithmetic = closed_form(pretrained, method)
    fallback = longrope_parameters(
        geometry, inv_freq, attention_factor, length / geometry.original_max_position_embeddings
    )
    # Phi-3.5-MoE wants its two multipliers of cos and sin in any type but `default`.
    with_mscales = {**fallback, "short_mscale": attention_factor, "long_mscale": attention_factor}
    kept = pretrained.other_parameters
    candidates = [native or fallback, fallback, with_mscales]
    if pretrained.rope_parameters.get("rope_type") == "proportional":
        if inv_freq[:2].all():
            candidates.insert(0, _proportional(pretrained, inv_freq))
        kept["partial_rotary_factor"] = 1.0  # the share is in the frequencies: those of other pairs are 0
    if not slot.in_config:
        stated = {**kept, "rope_theta": geometry.rope_theta, **(native or fallback)}
        return Extension(inv_freq.float(), attention_factor, stated, arithmetic)
    refusals = []
    for candidate in candidates:
        parameters = {**kept, "rope_theta": geometry.rope_theta, **candidate}
        try:
            whole = slot.with_part(rope_parameters_of(slot.config), parameters)
            config = config_with(slot, whole, length)
            found, found_factor = host_frequencies(slot, config)
        except Exception as error:
            reason = str(error).partition(". ")[0].rstrip(".")
            refusals.append(f"{parameters['rope_type']}: {reason:.120}")
            continue
        if matches(found, inv_freq) and abs(found_factor - attention_factor) <= _TOLERANCE * abs(attention_factor):
            return Extension(found, found_factor, slot.part_of(config.rope_parameters), arithmetic)
        refusals.append(f"{parameters['rope_type']}: Transformers computes other frequencies from it")
    raise RopeScalingError(
        f"{type(slot.config).__name__} cannot express {method.name!r}, so a saved model would lose it "
        f"({'; '.join(dict.fromkeys(refusals))}). Use {_expressible(pretrained)}a span method, such as 'self_extend', "
        "which changes no frequencies."
    )


def _proportional(pretrained: Pretrained, inv_freq: torch.Tensor) -> dict[str, Any]:
    """Frequencies in the form of a model that rotates a share of its pairs: one base, one factor, the same share."""
    arrived = pretrained.rope_parameters
    first, second = (inv_freq[:2] / pretrained.inv_freq[:2].double()).tolist()
    return {
        "rope_type": "proportional",
        "rope_theta": arrived["rope_theta"] * (first / second) ** len(inv_freq),
        "factor": arrived.get("factor", 1.0) / first,
        "partial_rotary_factor": arrived.get("partial_rotary_factor", 1.0),
    }


def _expressible(pretrained: Pretrained) -> str:
    return "'linear', 'ntk' or 'abf', or " if pretrained.rope_parameters.get("rope_type") == "proportional" else ""


def as_it_arrived(pretrained: Pretrained) -> Extension:
    """What a patch without a frequency method leaves in a slot."""
    return Extension(
        pretrained.inv_freq, pretrained.attention_factor, pretrained.rope_parameters, "as the model arrived"
    )


def matches(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether frequencies agree to float32 rounding; a pair that stands still may turn by less than 1e-30 a token."""
    return found.shape == wanted.shape and torch.allclose(
        found.double().cpu(), wanted.double(), rtol=_TOLERANCE, atol=1e-30
    )


def closed_form(
    pretrained: Pretrained, method: FrequencyMethod
) -> tuple[torch.Tensor, float, dict[str, Any] | None, str]:
    """Frequencies in float64, attention factor, the native form if there is one, and the arithmetic in words."""
    geometry, arrived = pretrained.geometry, pretrained.method
    length, reach = geometry.original_max_position_embeddings, pretrained.reach
    if arrived is None:
        inv_freq, attention_factor = method.frequencies(geometry)
        arithmetic = f"{method.name} over {length} trained tokens"
        return inv_freq, attention_factor, method.rope_parameters(geometry), arithmetic
    if method.wrapped_field:
        # It comes last: what Resonance rounds would not be whole after another multiplication.
        wrapped = getattr(method, method.wrapped_field)
        kept = pretrained.inv_freq.double(), pretrained.attention_factor, None, f"arrived with {arrived.name}; kept"
        inv_freq, attention_factor, _, arithmetic = closed_form(pretrained, wrapped) if wrapped else kept
        return method.on_top(inv_freq), attention_factor, None, f"{arithmetic}; then {method.name}"
    if (merged := method.after(arrived)) is not None:
        before, more = factor_of(arrived), factor_of(method)
        inv_freq, attention_factor = merged.frequencies(geometry)
        arithmetic = (
            f"arrived with {arrived.name} x{before:g} over {length} tokens; "
            f"x{more:g} more makes {arrived.name} x{before * more:g} over {length} tokens"
        )
        return inv_freq, attention_factor, merged.rope_parameters(geometry), arithmetic
    as_trained = replace(geometry, original_max_position_embeddings=reach)
    scaled, factor = method.frequencies(as_trained)
    inv_freq = pretrained.inv_freq.double() * scaled / default_inv_freq(geometry)
    arithmetic = (
        f"arrived with {arrived.name}, which reads {reach} tokens; kept, and multiplied pair by pair with what "
        f"{method.name} does to a model trained at {reach} tokens"
    )
    return inv_freq, pretrained.attention_factor * factor, None, arithmetic
