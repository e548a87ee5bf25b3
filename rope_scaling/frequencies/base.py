"""What every frequency method is: a frozen dataclass with one pure function, and the helpers that several share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.geometry import RopeGeometry, default_inv_freq
from rope_scaling.notation import MethodBase, changed_fields


# The host divides by its factor list in float32; this much gives a frequency of zero there, and is still valid JSON.
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class FrequencyMethod(MethodBase, ABC):
    """Changes how fast each pair of a rotary model rotates; nothing else, and at no cost at run time."""

    name: ClassVar[str]
    paper: ClassVar[str]
    """Where the method comes from, as a link."""
    changes: ClassVar[str]
    """What it does to the frequencies, in a few words."""
    needs_training: ClassVar[str]
    """Whether it is of use without fine-tuning: `no`, `helps` or `yes`."""

    def __post_init__(self) -> None:
        if getattr(self, "factor", None) is not None:
            check_number("factor", self.factor, at_least=1.0)  # type: ignore[attr-defined]
        if getattr(self, "attention_factor", None) is not None:
            check_number("attention_factor", self.attention_factor, above=0.0)  # type: ignore[attr-defined]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise RopeScalingError(f"`{field.name}` must be True or False; got {value!r}.")
            if field.type == "float":
                check_number(field.name, value)

    @abstractmethod
    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        """The frequencies in float64, `[R / 2]`, and the attention factor; `inv_freq` is what callers use."""

    def inv_freq(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        """The scaled frequencies of a model.

        Args:
            geometry (`RopeGeometry`): The model's rotary part.

        Returns:
            `tuple[torch.Tensor, float]`: radians per token of each pair, `[R / 2]`, float32; and the attention factor
            that multiplies cos and sin, so that logits of the rotary part are multiplied by its square.

        Raises:
            RopeScalingError: the method cannot be computed for this model.
        """
        inv_freq, attention_factor = self.frequencies(geometry)
        return inv_freq.to(torch.float32), float(attention_factor)

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        """The method in the terms of Transformers' `config.rope_parameters`.

        The general answer is `longrope` with both factor lists equal to pretrained over scaled frequency. A method
        with a native type of its own returns that.
        """
        inv_freq, attention_factor = self.frequencies(geometry)
        return longrope_parameters(geometry, inv_freq, attention_factor, getattr(self, "factor", None))

    def on_top(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """What a method that wraps another does to that method's frequencies; nothing, for all others.

        Args:
            inv_freq (`torch.Tensor`): Frequencies of the wrapped method, `[R / 2]`, float64.
        """
        return inv_freq

    def after(self, earlier: FrequencyMethod) -> FrequencyMethod | None:
        """One method that does what `earlier` and this one do one after the other, or `None` if there is none.

        The same method with the factors multiplied, where both have one. Other fields are those of this method where
        they were set.

        Args:
            earlier (`FrequencyMethod`): The scaling that a checkpoint is loaded with.
        """
        if type(earlier) is not type(self) or not any(field.name == "factor" for field in fields(self)):
            return None
        factors = [getattr(method, "factor", None) or 1.0 for method in (earlier, self)]
        return replace(earlier, **{**changed_fields(self), "factor": factors[0] * factors[1]})


def longrope_parameters(
    geometry: RopeGeometry, inv_freq: torch.Tensor, attention_factor: float, factor: float | None = None
) -> dict[str, Any]:
    """Any static frequencies as Transformers' `longrope` type, the same at every length.

    Args:
        geometry (`RopeGeometry`): The model's rotary part.
        inv_freq (`torch.Tensor`): Frequencies to express, `[R / 2]`.
        attention_factor (`float`): Multiplier of cos and sin.
        factor (`float`, *optional*): Target length over trained length; only informs the reader.
    """
    ratio = default_inv_freq(geometry) / inv_freq.double()  # [R / 2]
    factors = ratio.clamp(max=_FLOAT32_MAX).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": list(factors),
        "factor": float(factor or 1.0),
        "attention_factor": float(attention_factor),
        "original_max_position_embeddings": geometry.original_max_position_embeddings,
    }


def ntk_theta(geometry: RopeGeometry, factor: float) -> float:
    """The base `b * s^(R/(R-2))` that leaves the fastest pair alone and slows the slowest by exactly `s`.

    Raises:
        RopeScalingError: the model rotates a single pair, which is fastest and slowest at once.
    """
    if geometry.rotary_dim < 4:
        raise RopeScalingError(
            f"NTK scaling needs at least two rotated pairs; this model has {geometry.num_pairs}. Use `linear` instead."
        )
    return geometry.rope_theta * factor ** (geometry.rotary_dim / (geometry.rotary_dim - 2))


def correction_index(geometry: RopeGeometry, num_rotations: float) -> float:
    """The (fractional) pair that makes `num_rotations` rotations within the trained length."""
    length = geometry.original_max_position_embeddings
    return geometry.rotary_dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(geometry.rope_theta))


def correction_ramp(geometry: RopeGeometry, beta_fast: float, beta_slow: float, truncate: bool = True) -> torch.Tensor:
    """0 for pairs with more than `beta_fast` rotations in the trained length, 1 below `beta_slow`, linear between.

    The ends are rounded outwards unless `truncate` is false, and clamped to `[0, R - 1]` as the YaRN paper's code and
    Transformers do, so in a model with few pairs or a long trained length the last pair may stay below 1.

    Returns:
        `torch.Tensor`: `[R / 2]`, float64.
    """
    low, high = correction_index(geometry, beta_fast), correction_index(geometry, beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, geometry.rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(geometry.num_pairs, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def rotations(geometry: RopeGeometry) -> torch.Tensor:
    """How often each pair rotates within the trained length, `[R / 2]`, float64."""
    return geometry.original_max_position_embeddings * default_inv_freq(geometry) / (2 * math.pi)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's multiplier of cos and sin, `0.1 * mscale * ln(s) + 1`; 1 for `s <= 1`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
