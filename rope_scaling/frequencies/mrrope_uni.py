"""MrRoPE-Uni."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import check_number
from rope_scaling.frequencies.base import FrequencyMethod, rotations, yarn_attention_factor
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class MrRopeUni(FrequencyMethod):
    """MrRoPE-Uni: the slow-down grows by the same ratio from pair to pair
    ([paper](https://huggingface.co/papers/2601.22181)).

    `theta'_i = theta_i / s^(t/n)`, `t` pairs beyond the last one kept, in a band of `n`.
    cos and sin times `0.1 ln(s) + 1`.
    """

    name: ClassVar[str] = "mrrope_uni"
    paper: ClassVar[str] = "https://huggingface.co/papers/2601.22181"
    changes: ClassVar[str] = "middle in equal steps, temperature"
    needs_training: ClassVar[str] = "no"

    factor: float
    """Target length over trained length, at least 1."""
    beta_fast: float = 32.0
    """The last pair that rotates more often than this within the trained length is the last that is kept."""
    beta_slow: float = 1.0
    """The first pair that rotates less often than this within the trained length is slowed by the full factor."""
    attention_factor: float | None = None
    """Multiplier of cos and sin; by default `0.1 ln(s) + 1`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_slow", self.beta_slow, above=0.0)
        check_number("beta_fast", self.beta_fast, at_least=self.beta_slow)

    def exponent(self, steps: torch.Tensor, width: int) -> torch.Tensor:
        """The exponent of `s` for pairs `steps` beyond the last kept one, in a band `width` pairs wide."""
        return steps / width

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        num_rotations = rotations(geometry)
        # Without a pair that fast, the band starts just before the first; without one that slow, it ends just after
        # the last.
        low = int((num_rotations > self.beta_fast).sum()) - 1
        high = geometry.num_pairs - int((num_rotations < self.beta_slow).sum())
        width = max(high - low, 1)
        steps = (torch.arange(geometry.num_pairs, dtype=torch.float64) - low).clamp(0, width)
        inv_freq = default_inv_freq(geometry) / self.factor ** self.exponent(steps, width)
        given = self.attention_factor
        return inv_freq, yarn_attention_factor(self.factor) if given is None else given
