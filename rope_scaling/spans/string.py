"""STRING."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_number, keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, beyond, within


@dataclass(frozen=True, kw_only=True)
class String(SpanMethod):
    """Distances near the trained length, which training saw least, are shifted to smaller ones
    ([paper](https://huggingface.co/papers/2410.18745)).

    `rho(D) = D` for `D < S`, else `D - S + W`; logits of the rotary part are multiplied by `attention_factor` squared.
    The authors' prefill counts the key at distance `S` twice; here it counts once. Meant for use within the trained
    length; it reads `L0 + S - W` tokens at most.
    """

    name: ClassVar[str] = "string"
    paper: ClassVar[str] = "https://huggingface.co/papers/2410.18745"
    changes: ClassVar[str] = "far distances shifted to nearer ones"

    shift: int | None = None
    """Distance from which on keys are shifted, `S`, in tokens; by default a third of the trained length."""
    window: int | None = None
    """Distance that the first shifted key is seen at, `W`, in tokens; by default 128, or a quarter of the shift."""
    attention_factor: float = 0.1 * math.log(2) + 1.0
    """Multiplier of cos and sin, as the authors set it; 1 leaves logits alone."""

    def __post_init__(self) -> None:
        check_number("attention_factor", self.attention_factor, above=0.0)
        keep_whole(self, "shift", "window")

    def spans(self, rope: Rope) -> list[Span]:
        shift, window = self._lengths(rope)
        if window > shift:
            raise RopeScalingError(
                f"`window` is {window} and `shift` {shift}: keys would be pushed away, not drawn nearer. Give "
                "a window of at most the shift."
            )
        amplitude = torch.full_like(rope.inv_freq, self.attention_factor**2) if self.attention_factor != 1 else None
        near = within(shift)
        return [
            Span(near.first, near.last, amplitude=amplitude),
            beyond(shift, rope.positions(lambda m: m - shift + window), amplitude=amplitude),
        ]

    def reach(self, rope: Rope) -> int:
        shift, window = self._lengths(rope)
        return max(rope.trained_length, min(shift, rope.trained_length) + rope.trained_length - window)

    def _lengths(self, rope: Rope) -> tuple[int, int]:
        shift = self.shift or max(rope.trained_length // 3, 1)
        return shift, self.window or min(128, max(shift // 4, 1))
