"""Resonance RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Resonance(FrequencyMethod):
    """Resonance RoPE: every wavelength rounded to a whole number of tokens, on top of another method
    ([paper](https://huggingface.co/papers/2403.00071)).

    `theta''_i = 2 pi / round(2 pi / theta'_i)`, halves rounded to even; a stopped pair stays so.
    """

    name: ClassVar[str] = "resonance"
    paper: ClassVar[str] = "https://huggingface.co/papers/2403.00071"
    changes: ClassVar[str] = "whole-token wavelengths, on another"
    needs_training: ClassVar[str] = "helps"
    wrapped_field: ClassVar[str] = "wrapped"

    wrapped: FrequencyMethod | None = None
    """The method below; the pretrained frequencies if not given."""

    def __post_init__(self) -> None:
        if self.wrapped is not None and not isinstance(self.wrapped, FrequencyMethod):
            raise RopeScalingError(
                f"`wrapped` must be a frequency method such as `Yarn(factor=4)`; got {self.wrapped!r}. "
                'By name: `patch(model, "resonance", wrapped="yarn", factor=4)`.'
            )

    @property
    def factor(self) -> float | None:
        """The wrapped method's factor, if it has one."""
        return getattr(self.wrapped, "factor", None)

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        inv_freq, attention_factor = (
            self.wrapped.frequencies(geometry) if self.wrapped else (default_inv_freq(geometry), 1.0)
        )
        return self.on_top(inv_freq), attention_factor

    def on_top(self, inv_freq: torch.Tensor) -> torch.Tensor:
        return whole_wavelengths(inv_freq)

    @classmethod
    def sweep_fields(cls, factor: float) -> dict[str, Any]:
        return {"wrapped": "yarn"}


def whole_wavelengths(inv_freq: torch.Tensor) -> torch.Tensor:
    """Frequencies whose wavelengths are the given ones rounded to whole tokens; 0 stays 0."""
    return 2 * math.pi / (2 * math.pi / inv_freq).round()
