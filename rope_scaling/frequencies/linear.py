"""Position interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Linear(FrequencyMethod):
    """Position interpolation: every pair rotates `s` times slower ([paper](https://huggingface.co/papers/2306.15595)).

    `theta'_i = theta_i / s`

    Weak without fine-tuning, since the fast pairs that tell neighbours apart are slowed too; 1,000 steps fix it.
    """

    name: ClassVar[str] = "linear"
    paper: ClassVar[str] = "https://huggingface.co/papers/2306.15595"
    changes: ClassVar[str] = "every pair s times slower"
    needs_training: ClassVar[str] = "yes"

    factor: float
    """Target length over trained length, at least 1."""

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        return default_inv_freq(geometry) / self.factor, 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        return {"rope_type": "linear", "factor": float(self.factor)}
