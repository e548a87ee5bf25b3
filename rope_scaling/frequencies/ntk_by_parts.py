"""NTK-by-parts in its three-set form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import check_number
from rope_scaling.frequencies.base import FrequencyMethod, correction_ramp, ntk_theta
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class NtkByParts(FrequencyMethod):
    """NTK-by-parts: fast pairs kept, a band of NTK, slow pairs interpolated (bloc97, 2023; code of the
    [YaRN paper](https://huggingface.co/papers/2309.00071)).

    With `ramp(f, g)` going from 0 for pairs that rotate `f` times within `L0` to 1 for `g` times:
    `x = (1 - m1) theta/s + m1 theta_ntk`, `theta' = (1 - m2) x + m2 theta`,
    `m1 = (1 - ramp(1.25, 0.75)) ntk_factor`, `m2 = (1 - ramp(16, 2)) extrapolation_factor`.

    The two-set form of the paper's text is [`Yarn`] with `attention_factor=1.0`.
    """

    name: ClassVar[str] = "ntk_by_parts"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.00071"
    changes: ClassVar[str] = "fast pairs kept, band of ntk, slow /s"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""
    ntk_factor: float = 1.0
    """Weight of the NTK set in the middle band, 0 to 1."""
    extrapolation_factor: float = 1.0
    """Weight of the pretrained frequencies in the fast band, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ntk_factor", self.ntk_factor, at_least=0.0)
        check_number("extrapolation_factor", self.extrapolation_factor, at_least=0.0)

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        pretrained = default_inv_freq(geometry)
        ntk = default_inv_freq(geometry, ntk_theta(geometry, self.factor))
        ntk_weight = (1 - correction_ramp(geometry, 1.25, 0.75)) * self.ntk_factor
        kept_weight = (1 - correction_ramp(geometry, 16, 2)) * self.extrapolation_factor
        slowed = torch.lerp(pretrained / self.factor, ntk, ntk_weight)
        return torch.lerp(slowed, pretrained, kept_weight), 1.0
