"""p-RoPE, which Transformers calls proportional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class PRope(FrequencyMethod):
    """p-RoPE: the slowest pairs are stopped, so that they carry content alone
    ([paper](https://huggingface.co/papers/2410.06205)).

    `theta'_i = theta_i` for the first `floor(p R / 2)` pairs, 0 for the others.
    """

    name: ClassVar[str] = "p_rope"
    paper: ClassVar[str] = "https://huggingface.co/papers/2410.06205"
    changes: ClassVar[str] = "slowest pairs stopped"
    needs_training: ClassVar[str] = "yes"

    partial_rotary_factor: float = 0.75
    """The share `p` of pairs that keep rotating, 0 to 1; spelt as Transformers' `proportional` type spells it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_number("partial_rotary_factor", self.partial_rotary_factor, at_least=0.0) > 1:
            raise RopeScalingError(
                f"`partial_rotary_factor` must be between 0 and 1; got {self.partial_rotary_factor:g}."
            )

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        inv_freq = default_inv_freq(geometry)
        inv_freq[int(self.partial_rotary_factor * geometry.rotary_dim // 2) :] = 0.0
        return inv_freq, 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        return {"rope_type": "proportional", "partial_rotary_factor": float(self.partial_rotary_factor)}
