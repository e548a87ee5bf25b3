"""DroPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class DroPe(FrequencyMethod):
    """DroPE: no rotation at all, after a short recalibration at the trained length
    ([paper](https://huggingface.co/papers/2512.12167)).

    `theta'_i = 0`; useless without training. A softmax temperature `beta` is `attention_factor = sqrt(beta)`.
    """

    name: ClassVar[str] = "drope"
    paper: ClassVar[str] = "https://huggingface.co/papers/2512.12167"
    changes: ClassVar[str] = "every pair stopped"
    needs_training: ClassVar[str] = "yes"

    attention_factor: float = 1.0
    """Multiplier of cos and sin; logits are multiplied by its square."""

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        return torch.zeros_like(default_inv_freq(geometry)), self.attention_factor
