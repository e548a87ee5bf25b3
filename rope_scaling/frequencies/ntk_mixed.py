"""Mixed-radix NTK."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import check_number
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class NtkMixed(FrequencyMethod):
    """Mixed-radix NTK by Jianlin Su: a smooth slow-down of every pair ([post](https://kexue.fm/archives/9706)).

    `theta'_i = theta_i * exp(-a (i+1)^e)` with `a = ln(s) / (R/2)^e`; the slowest pair is slowed by exactly `s`.

    The author combines it with a log-n query scale, which is a temperature and not part of this method.
    """

    name: ClassVar[str] = "ntk_mixed"
    paper: ClassVar[str] = "https://kexue.fm/archives/9706"
    changes: ClassVar[str] = "all pairs slower, slow ones more"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""
    exponent: float = 0.75
    """How the slow-down is spread over the pairs, above 0; smaller values slow the fast pairs more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("exponent", self.exponent, above=0.0)

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        share = torch.arange(1, geometry.num_pairs + 1, dtype=torch.float64) / geometry.num_pairs  # [R / 2]
        return default_inv_freq(geometry) * torch.exp(-math.log(self.factor) * share**self.exponent), 1.0
