"""Adjusted base frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.geometry import RopeGeometry, default_inv_freq


@dataclass(frozen=True, kw_only=True)
class Abf(FrequencyMethod):
    """ABF: a larger base, and nothing else ([paper](https://huggingface.co/papers/2309.16039)).

    `theta'_i = b'^(-2i/R)`. Without a given `rope_theta`, the critical base at which the pairs with a full rotation
    within `L0` are as many as those that will within `s * L0` ([paper](https://huggingface.co/papers/2310.05209)):
    `b' = b^(ln(s L0 / 2 pi) / ln(L0 / 2 pi))`.
    """

    name: ClassVar[str] = "abf"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.16039"
    changes: ClassVar[str] = "larger base, given or critical"
    needs_training: ClassVar[str] = "yes"

    rope_theta: float | None = None
    """The new base, above 1; 500,000 in the paper, for 32k tokens from 4k."""
    factor: float | None = None
    """Target length over trained length, at least 1; sets the base where none is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_theta is not None:
            check_number("rope_theta", self.rope_theta, above=1.0)
        elif self.factor is None:
            raise RopeScalingError(
                "`abf` needs a new base, `rope_theta`, or a `factor` to derive one from; got neither."
            )

    def base(self, geometry: RopeGeometry) -> float:
        """The new base for this model.

        Raises:
            RopeScalingError: no `rope_theta` was given, and the trained length is too short to derive one.
        """
        if self.rope_theta is not None:
            return float(self.rope_theta)
        num_rotations = geometry.original_max_position_embeddings / (2 * math.pi)
        if num_rotations <= 1:
            raise RopeScalingError(
                f"No base can be derived from a trained length of {geometry.original_max_position_embeddings} tokens, "
                "which is below one rotation of the fastest pair. Give `rope_theta`."
            )
        return geometry.rope_theta ** (1 + math.log(self.factor or 1.0) / math.log(num_rotations))

    def frequencies(self, geometry: RopeGeometry) -> tuple[torch.Tensor, float]:
        return default_inv_freq(geometry, self.base(geometry)), 1.0

    def rope_parameters(self, geometry: RopeGeometry) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.base(geometry)}
