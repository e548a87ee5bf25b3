"""What a frequency method needs to know of a model: plain numbers, no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rope_scaling.errors import RopeScalingError, check_length, check_number


@dataclass(frozen=True, kw_only=True)
class RopeGeometry:
    """The rotary part of a pretrained model.

    Raises:
        RopeScalingError: the rotary width is odd or below 2, the base is not above 1, or a length is not positive.
    """

    rotary_dim: int
    """Rotary width `R`: how many dimensions of a head are rotated, in pairs; partial rotary models leave some out."""
    rope_theta: float
    """Base `b` of the pretrained frequencies `b^(-2i/R)`."""
    original_max_position_embeddings: int
    """Trained length `L0`, in tokens."""
    head_dim: int | None = None
    """Width of a head; `rotary_dim` if not given."""
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    layer_type: str | None = None
    """Layer type that these numbers hold for, in models whose layer types rotate differently; else `None`."""

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise RopeScalingError(
                "The rotary width must be even and at least 2, because dimensions rotate in pairs; got "
                f"{self.rotary_dim}. Check `head_dim` and `partial_rotary_factor` in the model's config."
            )
        check_number("rope_theta", self.rope_theta, above=1.0)
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)

    @property
    def num_pairs(self) -> int:
        """Number of rotated pairs, `R / 2`."""
        return self.rotary_dim // 2


def default_inv_freq(geometry: RopeGeometry, rope_theta: float | None = None) -> torch.Tensor:
    """The frequencies `b^(-2i/R)` that RoPE starts from ([RoFormer](https://huggingface.co/papers/2104.09864)).

    Args:
        geometry (`RopeGeometry`): The model's rotary part.
        rope_theta (`float`, *optional*): Base `b`, in place of the model's own.

    Returns:
        `torch.Tensor`: radians per token of each pair, `[R / 2]`, float64.
    """
    exponents = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.float64) / geometry.rotary_dim  # [R / 2]
    return (rope_theta or geometry.rope_theta) ** -exponents
