"""Frequency clipping, soft and hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, keep_whole
from rope_scaling.frequencies.base import FrequencyMethod, rotations
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class ClippedFrequency(FrequencyMethod):
    """CoPE: the slowest pairs tapered to a standstill (soft), or stopped (hard)
    ([paper](https://huggingface.co/papers/2602.05258)).

    Over the `n` slowest pairs, `theta'_j = theta_j (1 + cos(pi k / (n - 1))) / 2`, `k = 0 .. n-1`; hard: 0.

    This clips frequencies. It is not the angle clip, in which a pair rotates freely up to a maximum angle.
    """

    name: ClassVar[str] = "clipped_frequency"
    paper: ClassVar[str] = "https://huggingface.co/papers/2602.05258"
    changes: ClassVar[str] = "slowest tapered to a stop, or stopped"
    needs_training: ClassVar[str] = "yes"

    num_pairs: int | None = None
    """How many of the slowest pairs; by default those with wavelengths beyond the trained length (paper: 20 of 64)."""
    soft: bool = True
    """Taper (the paper's CoPE) or stop (its HardClip)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_whole(self, "num_pairs")

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        clipped = int((rotations(geometry) < 1).sum()) if self.num_pairs is None else self.num_pairs
        if clipped > geometry.num_pairs:
            raise RopeScalingError(f"`num_pairs` is {clipped}; this model rotates {geometry.num_pairs} pairs.")
        taper = (1 + torch.cos(torch.pi * torch.linspace(0, 1, clipped, dtype=torch.float64))) / 2
        # The cosine of pi is -1 only up to rounding, and a single pair has no taper: the last pair is stopped by
        # definition.
        taper[-1:] = 0.0
        multiplier = torch.ones(geometry.num_pairs, dtype=torch.float64)
        multiplier[geometry.num_pairs - clipped :] = taper if self.soft else 0.0
        return default_inv_freq(geometry) * multiplier, 1.0
