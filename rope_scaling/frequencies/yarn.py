"""YaRN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.frequencies.base import (
    FrequencyMethod,
    correction_ramp,
    longrope_parameters,
    yarn_attention_factor,
)
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Yarn(FrequencyMethod):
    """YaRN: fast pairs kept, slow pairs interpolated, a ramp between, and a temperature
    ([paper](https://huggingface.co/papers/2309.00071)).

    `theta'_i = (1 - r_i) theta_i + r_i theta_i / s`, `r` from 0 at `beta_fast` rotations in `L0` to 1 at `beta_slow`;
    cos and sin are multiplied by `0.1 ln(s) + 1`.
    """

    name: ClassVar[str] = "yarn"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.00071"
    changes: ClassVar[str] = "fast pairs kept, slow /s, temperature"
    needs_training: ClassVar[str] = "helps"

    factor: float
    """Target length over trained length, at least 1."""
    beta_fast: float = 32.0
    """Pairs that rotate more often than this within the trained length are kept."""
    beta_slow: float = 1.0
    """Pairs that rotate less often than this within the trained length are interpolated by the full factor."""
    attention_factor: float | None = None
    """Multiplier of cos and sin; by default `0.1 ln(s) + 1`, or what `mscale` and `mscale_all_dim` give."""
    mscale: float | None = None
    """With `mscale_all_dim`, attention factor `(0.1 mscale ln(s) + 1) / (0.1 mscale_all_dim ln(s) + 1)` (DeepSeek)."""
    mscale_all_dim: float | None = None
    """See `mscale`; either alone has no effect, as in Transformers."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole pairs."""
    revised: bool = False
    """Interpolate wavelengths, not frequencies: `theta_i / (1 - r_i + s r_i)`, the "revised YaRN" of PoSE's code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta_slow", self.beta_slow, above=0.0)
        check_number("beta_fast", self.beta_fast, above=0.0)
        if self.beta_fast < self.beta_slow:
            raise RopeScalingError(
                f"`beta_fast` counts the rotations of faster pairs and must be at least `beta_slow`; "
                f"got beta_fast={self.beta_fast:g}, beta_slow={self.beta_slow:g}."
            )

    def default_attention_factor(self) -> float:
        """The attention factor when none is given."""
        if self.mscale and self.mscale_all_dim:
            return yarn_attention_factor(self.factor, self.mscale) / yarn_attention_factor(
                self.factor, self.mscale_all_dim
            )
        return yarn_attention_factor(self.factor)

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        pretrained = default_inv_freq(geometry)
        ramp = correction_ramp(geometry, self.beta_fast, self.beta_slow, self.truncate)
        if self.revised:
            inv_freq = pretrained / torch.lerp(torch.ones_like(ramp), torch.full_like(ramp, self.factor), ramp)
        else:
            inv_freq = torch.lerp(pretrained, pretrained / self.factor, ramp)
        given = self.attention_factor
        return inv_freq, self.default_attention_factor() if given is None else given

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        inv_freq, attention_factor = self.frequencies(geometry)
        if self.revised:
            return longrope_parameters(geometry, inv_freq, attention_factor, self.factor)
        native = {
            "rope_type": "yarn",
            "factor": float(self.factor),
            "beta_fast": float(self.beta_fast),
            "beta_slow": float(self.beta_slow),
            "attention_factor": float(attention_factor),
            "original_max_position_embeddings": geometry.original_max_position_embeddings,
        }
        if self.mscale and self.mscale_all_dim:
            native |= {"mscale": float(self.mscale), "mscale_all_dim": float(self.mscale_all_dim)}
        return native if self.truncate else native | {"truncate": False}
