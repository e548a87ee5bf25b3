"""WavePrune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import check_number
from rope_scaling.spans.base import Rope, Span, SpanMethod, causal


@dataclass(frozen=True, kw_only=True)
class WavePrune(SpanMethod):
    """A pair counts up to its first rotations and is taken out beyond ([paper](https://huggingface.co/papers/2610.06963)).

    Pair `i` contributes while `D theta_i <= 2 pi alpha`. The authors' kernel treats 16 dimensions as one, with the
    largest window among them; this is the definition itself, pair by pair.
    """

    name: ClassVar[str] = "waveprune"
    paper: ClassVar[str] = "https://huggingface.co/papers/2610.06963"
    changes: ClassVar[str] = "pairs count in their first rotation only"

    alpha: float = 1.0
    """Rotations up to which a pair counts."""

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, above=0.0)

    def spans(self, rope: Rope) -> list[Span]:
        # The first distance at which a pair no longer counts; the small term keeps a whole number of rotations in.
        gone = torch.floor(2 * math.pi * self.alpha / rope.inv_freq + 1e-9) + 1
        limits = sorted({int(distance) for distance in gone.tolist() if distance != math.inf})
        spans: list[Span] = []
        for nearest, farthest in zip([0, *limits], [*limits, None], strict=True):
            before = spans[-1] if spans and spans[-1].amplitude is not None else None
            spans.append(_band(nearest, farthest, (gone > nearest).double(), before))
        return spans


def _band(nearest: int, farthest: int | None, amplitude: torch.Tensor, before: Span | None) -> Span:
    return Span(
        first=torch.zeros_like if farthest is None else lambda m: (m - farthest + 1).clamp(min=0),
        last=(lambda m: m - nearest) if nearest else causal,
        amplitude=None if bool((amplitude == 1).all()) else amplitude,
        after=before,
    )
