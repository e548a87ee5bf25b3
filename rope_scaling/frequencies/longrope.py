"""LongRoPE with given factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number, check_sequence
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class LongRope(FrequencyMethod):
    """LongRoPE: one factor per pair, found by search ([paper](https://huggingface.co/papers/2402.13753)).

    `theta'_i = theta_i / lambda_i`; cos and sin times `sqrt(1 + ln(s) / ln(L0))`.

    Static: the long factors at every length, or, at `factor=1`, the short ones. Deployments that switch between the
    two at the trained length invalidate the keys in their cache when they do.
    """

    name: ClassVar[str] = "longrope"
    paper: ClassVar[str] = "https://huggingface.co/papers/2402.13753"
    changes: ClassVar[str] = "given factor per pair, temperature"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""
    long_factor: tuple[float, ...]
    """One factor a pair, above 0, in use at `factor` above 1."""
    short_factor: tuple[float, ...] | None = None
    """One factor a pair, above 0, in use at `factor=1`; all ones if not given."""
    attention_factor: float | None = None
    """Multiplier of cos and sin; by default `sqrt(1 + ln(s) / ln(L0))`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("long_factor", "short_factor"):
            factors = getattr(self, name)
            if factors is None and name == "short_factor":
                continue
            object.__setattr__(self, name, check_factors(name, factors))

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        for name, factors in (("long_factor", self.long_factor), ("short_factor", self.short_factor)):
            if factors is not None and len(factors) != geometry.num_pairs:
                raise RopeScalingError(
                    f"`{name}` has {len(factors)} numbers; this model rotates {geometry.num_pairs} pairs "
                    f"(rotary width {geometry.rotary_dim}) and needs one for each."
                )
        ones = (1.0,) * geometry.num_pairs
        factors = self.long_factor if self.factor > 1 else self.short_factor or ones
        length = geometry.original_max_position_embeddings
        attention_factor = self.attention_factor or math.sqrt(1 + math.log(self.factor) / math.log(length))
        return default_inv_freq(geometry) / torch.tensor(factors, dtype=torch.float64), attention_factor

    def after(self, earlier: FrequencyMethod) -> None:
        """None: lists are for one factor, and say nothing about the product of two."""


def check_factors(name: str, factors: Any) -> tuple[float, ...]:
    """Factors of pairs as numbers above 0; the largest of float32 stops a pair.

    Raises:
        RopeScalingError: they are none.
    """
    return tuple(
        check_number(f"{name}[{i}]", value, above=0.0, at_most=1e39)
        for i, value in enumerate(check_sequence(name, factors))
    )
