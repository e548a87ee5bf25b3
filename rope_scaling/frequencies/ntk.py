"""NTK-aware scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.frequencies.base import FrequencyMethod, ntk_theta
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Ntk(FrequencyMethod):
    """NTK-aware scaling: a larger base (bloc97, 2023; described in the [YaRN paper](https://huggingface.co/papers/2309.00071)).

    `b' = b * s^(R/(R-2))`, `theta'_i = b'^(-2i/R)`

    The fastest pair keeps its frequency and the slowest is slowed by exactly `s`. Some pairs in between rotate to
    angles never met in training, so the context grows by less than `s`: choose a `factor` above the wanted extension.
    """

    name: ClassVar[str] = "ntk"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.00071"
    changes: ClassVar[str] = "larger base: fastest kept, slowest /s"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        return default_inv_freq(geometry, ntk_theta(geometry, self.factor)), 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": ntk_theta(geometry, self.factor)}
