"""The rule of Llama 3.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.frequencies.base import FrequencyMethod, rotations
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Llama3(FrequencyMethod):
    """The rule of Llama 3.1: fast pairs kept, slow pairs interpolated, a blend linear in turns between
    ([paper](https://huggingface.co/papers/2407.21783)).

    `theta'_i = (1 - t) theta_i / s + t theta_i`, `t = (L0 / wavelength_i - low) / (high - low)` clipped to 0 and 1.
    Equal factors leave no blend: pairs that rotate less often are interpolated, the others kept (Llama 4 Scout).
    """

    name: ClassVar[str] = "llama3"
    paper: ClassVar[str] = "https://huggingface.co/papers/2407.21783"
    changes: ClassVar[str] = "fast pairs kept, slow /s"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""
    low_freq_factor: float = 1.0
    """Pairs that rotate less often than this within the trained length are interpolated by the full factor."""
    high_freq_factor: float = 4.0
    """Pairs that rotate more often than this within the trained length are kept; at least `low_freq_factor`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("low_freq_factor", self.low_freq_factor, above=0.0)
        check_number("high_freq_factor", self.high_freq_factor, above=0.0)
        if self.high_freq_factor < self.low_freq_factor:
            raise RopeScalingError(
                f"`high_freq_factor` must be at least `low_freq_factor`; "
                f"got high_freq_factor={self.high_freq_factor:g}, low_freq_factor={self.low_freq_factor:g}."
            )

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        pretrained = default_inv_freq(geometry)
        above, blend = rotations(geometry) - self.low_freq_factor, self.high_freq_factor - self.low_freq_factor
        kept = (above / blend).clamp(0, 1) if blend else (above >= 0).to(above.dtype)
        return torch.lerp(pretrained / self.factor, pretrained, kept), 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": float(self.factor),
            "low_freq_factor": float(self.low_freq_factor),
            "high_freq_factor": float(self.high_freq_factor),
            "original_max_position_embeddings": geometry.original_max_position_embeddings,
        }
