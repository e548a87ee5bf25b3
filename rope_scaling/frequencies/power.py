"""Giraffe's power basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Power(FrequencyMethod):
    """Giraffe's power basis: pairs slowed by a power of their rank ([paper](https://huggingface.co/papers/2308.10882)).

    `theta'_i = theta_i (1 - i / (R/2))^k`. Without a given `exponent`, the one that slows the slowest pair by exactly
    `s`: `k = ln(s) / ln(R/2)` (the default is ours; the paper tunes it).
    """

    name: ClassVar[str] = "power"
    paper: ClassVar[str] = "https://huggingface.co/papers/2308.10882"
    changes: ClassVar[str] = "slower by a power of the rank"
    needs_training: ClassVar[str] = "yes"

    exponent: float | None = None
    """The power `k`, above 0."""
    factor: float | None = None
    """Target length over trained length, at least 1; sets the exponent where none is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent is not None:
            check_number("exponent", self.exponent, above=0.0)
        elif self.factor is None:
            raise RopeScalingError("`power` needs an `exponent`, or a `factor` to derive one from; got neither.")

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        rank = 1 - torch.arange(geometry.num_pairs, dtype=torch.float64) / geometry.num_pairs  # [R / 2]
        exponent = self.exponent or math.log(self.factor or 1.0) / math.log(max(geometry.num_pairs, 2))
        return default_inv_freq(geometry) * rank**exponent, 1.0
