"""From a pretrained slot and a frequency method to frequencies that plain Transformers will compute alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, check_length
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.frequencies.base import longrope_parameters
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.pretrained_rope import PretrainedRope, frequencies_from_config
from rope_scaling.hf.slot import Slot
from rope_scaling.methods import factor_of


_TOLERANCE = 2e-6
"""Relative difference that float32 arithmetic in another order may make."""


@dataclass(frozen=True)
class Rescaling:
    """Rescaled frequencies of one slot, and a config that reproduces them."""

    inv_freq: torch.Tensor
    """`[R / 2]`, float32, bit for bit what plain Transformers computes from `rope_parameters`."""
    attention_factor: float
    rope_parameters: dict[str, Any]
    """The slot's part of the config to save."""
    arithmetic: str
    """In words: what was multiplied with what."""


@dataclass(frozen=True)
class ClosedForm:
    """What a method's formula gives for one slot."""

    inv_freq: torch.Tensor
    """`[R / 2]`, float64."""
    attention_factor: float
    rope_parameters: dict[str, Any] | None
    """In the form of a type that Transformers has for the method; `None` where it has none."""
    arithmetic: str
    """In words: what was multiplied with what."""


def target_length(pretrained: PretrainedRope, method: FrequencyMethod, given: int | None) -> int:
    """The length that a patched model is meant for, in tokens.

    Raises:
        RopeScalingError: the given length is below the context length as loaded, or contradicts the method.
    """
    factor = factor_of(method)
    derived = check_length("factor times trained length", int(pretrained.reach * factor))
    if given is None:
        return derived
    if given < pretrained.reach:
        raise RopeScalingError(
            f"`target_length` is {given}, but the context length as loaded is {pretrained.reach}; "
            f"give at least {pretrained.reach}."
        )
    if factor > 1 and abs(given - pretrained.reach * factor) >= 1:
        raise RopeScalingError(
            f"`target_length` is {given}, but the method's factor {factor:g} times {pretrained.reach} tokens is "
            f"{derived}. Give one of the two."
        )
    return given


def rescale(checkpoint: Checkpoint, slot: Slot, method: FrequencyMethod, length: int) -> Rescaling:
    """Applies a method to one of a checkpoint's slots.

    A model without scaling gets the method as it is. One that is loaded scaled by the same method gets one such
    method, with the factors multiplied and the first trained length kept. One that is loaded scaled by another method
    keeps its frequencies, and they are multiplied by what the new method does to a model trained at the length it
    reads now.

    Args:
        checkpoint (`Checkpoint`): The model as its checkpoint defines it.
        slot (`Slot`): One of its slots.
        method (`FrequencyMethod`): The method.
        length (`int`): Tokens that the model is to read.

    Raises:
        RopeScalingError: the method cannot be computed for this model, or no config could express it.
    """
    pretrained = checkpoint.rope(slot)
    form = closed_form(pretrained, method)
    shared = pretrained.other_parameters
    if pretrained.rope_parameters.get("rope_type") == "proportional":
        shared["partial_rotary_factor"] = 1.0  # the share is in the frequencies: those of other pairs are 0
    shared["rope_theta"] = pretrained.geometry.rope_theta
    candidates = _candidates(pretrained, form, length)
    if not slot.in_config:
        stated = {**shared, **(form.rope_parameters or _lists(pretrained, form, length))}
        return Rescaling(form.inv_freq.float(), form.attention_factor, stated, form.arithmetic)
    loaded, refusals = checkpoint.loaded(slot.config), []
    for candidate in candidates:
        parameters = {**shared, **candidate}
        try:
            config = loaded.with_settings(slot.with_part(loaded.settings["rope_parameters"], parameters), length)
            inv_freq, attention_factor = frequencies_from_config(slot, config)
        except Exception as error:
            reason = str(error).partition(". ")[0].rstrip(".")
            refusals.append(f"{parameters['rope_type']}: {reason:.120}")
            continue
        same_factor = abs(attention_factor - form.attention_factor) <= _TOLERANCE * abs(form.attention_factor)
        if matches(inv_freq, form.inv_freq) and same_factor:
            return Rescaling(inv_freq, attention_factor, slot.part_of(config.rope_parameters), form.arithmetic)
        refusals.append(f"{parameters['rope_type']}: Transformers computes other frequencies from it")
    raise RopeScalingError(
        f"{type(slot.config).__name__} cannot express {method.name!r}, so a saved model would lose it "
        f"({'; '.join(dict.fromkeys(refusals))}). Use {_expressible(pretrained)}a span method, such as 'self_extend', "
        "which changes no frequencies."
    )


def _candidates(pretrained: PretrainedRope, form: ClosedForm, length: int) -> Iterator[dict[str, Any]]:
    """RoPE parameters from which Transformers may compute the frequencies, the preferred ones first."""
    if pretrained.rope_parameters.get("rope_type") == "proportional" and form.inv_freq[:2].all():
        yield _proportional(pretrained, form.inv_freq)
    if form.rope_parameters is not None:
        yield form.rope_parameters
    lists = _lists(pretrained, form, length)
    yield lists
    # Phi-3.5-MoE wants its two multipliers of cos and sin in any type but `default`.
    yield {**lists, "short_mscale": form.attention_factor, "long_mscale": form.attention_factor}


def _lists(pretrained: PretrainedRope, form: ClosedForm, length: int) -> dict[str, Any]:
    """The frequencies as `longrope` lists, which have a factor for every pair."""
    factor = length / pretrained.geometry.original_max_position_embeddings
    return longrope_parameters(pretrained.geometry, form.inv_freq, form.attention_factor, factor)


def _proportional(pretrained: PretrainedRope, inv_freq: torch.Tensor) -> dict[str, Any]:
    """Frequencies in the form of a model that rotates a share of its pairs: one base, one factor, the same share."""
    loaded = pretrained.rope_parameters
    first, second = (inv_freq[:2] / pretrained.inv_freq[:2].double()).tolist()
    return {
        "rope_type": "proportional",
        "rope_theta": loaded["rope_theta"] * (first / second) ** len(inv_freq),
        "factor": loaded.get("factor", 1.0) / first,
        "partial_rotary_factor": loaded.get("partial_rotary_factor", 1.0),
    }


def _expressible(pretrained: PretrainedRope) -> str:
    return "'linear', 'ntk' or 'abf', or " if pretrained.rope_parameters.get("rope_type") == "proportional" else ""


def matches(inv_freq: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether frequencies agree to float32 rounding; one that is 0 may be up to 1e-30 radians a token."""
    return inv_freq.shape == wanted.shape and torch.allclose(
        inv_freq.double().cpu(), wanted.double(), rtol=_TOLERANCE, atol=1e-30
    )


def closed_form(pretrained: PretrainedRope, method: FrequencyMethod) -> ClosedForm:
    """The formula of a method, applied to a slot as loaded."""
    geometry, loaded = pretrained.geometry, pretrained.method
    length, reach = geometry.original_max_position_embeddings, pretrained.reach
    if loaded is None:
        inv_freq, attention_factor = method.frequencies(geometry)
        arithmetic = f"{method.name} over {length} trained tokens"
        return ClosedForm(inv_freq, attention_factor, method.rope_parameters(geometry), arithmetic)
    if method.wrapped_field:
        return _on_top(pretrained, method, getattr(method, method.wrapped_field))
    if (merged := method.after(loaded)) is not None:
        before, more = factor_of(loaded), factor_of(method)
        inv_freq, attention_factor = merged.frequencies(geometry)
        arithmetic = (
            f"loaded with {loaded.name} x{before:g} over {length} tokens; "
            f"x{more:g} more makes {loaded.name} x{before * more:g} over {length} tokens"
        )
        return ClosedForm(inv_freq, attention_factor, merged.rope_parameters(geometry), arithmetic)
    as_trained = replace(geometry, original_max_position_embeddings=reach)
    scaled, factor = method.frequencies(as_trained)
    inv_freq = pretrained.inv_freq.double() * scaled / default_inv_freq(geometry)
    arithmetic = (
        f"loaded with {loaded.name} for {reach} tokens; kept, and multiplied pair by pair with what "
        f"{method.name} does to a model trained at {reach} tokens"
    )
    return ClosedForm(inv_freq, pretrained.attention_factor * factor, None, arithmetic)


def _on_top(pretrained: PretrainedRope, method: FrequencyMethod, wrapped: FrequencyMethod | None) -> ClosedForm:
    """A method that comes last on a model that is loaded scaled: what Resonance rounds would not stay whole."""
    if wrapped:
        before = closed_form(pretrained, wrapped)
    else:
        arithmetic = f"loaded with {pretrained.method.name}; kept"  # type: ignore[union-attr]
        before = ClosedForm(pretrained.inv_freq.double(), pretrained.attention_factor, None, arithmetic)
    arithmetic = f"{before.arithmetic}; then {method.name}"
    return ClosedForm(method.on_top(before.inv_freq), before.attention_factor, None, arithmetic)
