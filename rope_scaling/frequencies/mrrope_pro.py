"""MrRoPE-Pro."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.frequencies.mrrope_uni import MrRopeUni


@dataclass(frozen=True, kw_only=True)
class MrRopePro(MrRopeUni):
    """MrRoPE-Pro: the slow-down grows progressively, so that the faster of the middle pairs keep more
    ([paper](https://huggingface.co/papers/2601.22181)).

    `theta'_i = theta_i / s^(t(t+1) / (n(n+1)))`, `t` pairs beyond the last one kept, in a band of `n`.
    cos and sin times `0.1 ln(s) + 1`.
    """

    name: ClassVar[str] = "mrrope_pro"
    changes: ClassVar[str] = "middle in growing steps, temperature"

    def exponent(self, steps: torch.Tensor, width: int) -> torch.Tensor:
        return steps * (steps + 1) / (width * (width + 1))
