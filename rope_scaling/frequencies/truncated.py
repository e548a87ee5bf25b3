"""Giraffe's truncated basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import keep_whole
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Truncated(FrequencyMethod):
    """Giraffe's truncated basis: slow pairs share one frequency, the slowest are stopped
    ([paper](https://huggingface.co/papers/2308.10882)).

    With `c = 2 pi / T`: `theta_i` where it is at least `c`, 0 where it is below `c / 8`, else `2 pi / (16 T)`.
    """

    name: ClassVar[str] = "truncated"
    paper: ClassVar[str] = "https://huggingface.co/papers/2308.10882"
    changes: ClassVar[str] = "slow share one speed, slowest stopped"
    needs_training: ClassVar[str] = "yes"

    cutoff_length: int | None = None
    """`T`, in tokens: pairs with a full rotation within it are kept; by default the trained length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_whole(self, "cutoff_length")

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        length = self.cutoff_length or geometry.original_max_position_embeddings
        cutoff = 2 * math.pi / length
        inv_freq = default_inv_freq(geometry)
        shared = torch.full_like(inv_freq, cutoff / 16)
        slow = torch.where(inv_freq < cutoff / 8, torch.zeros_like(inv_freq), shared)
        return torch.where(inv_freq < cutoff, slow, inv_freq), 1.0
