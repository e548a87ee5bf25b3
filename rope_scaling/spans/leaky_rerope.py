"""Leaky ReRoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rope_scaling.errors import check_number, keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, beyond, within
from rope_scaling.spans.rerope import half


@dataclass(frozen=True, kw_only=True)
class LeakyReRope(SpanMethod):
    """Distances grow more slowly beyond a window ([kexue.fm 9708](https://kexue.fm/archives/9708)).

    `rho(D) = D` for `D < w`, else `w + (D - w) / k`.
    """

    name: ClassVar[str] = "leaky_rerope"
    paper: ClassVar[str] = "https://kexue.fm/archives/9708"
    changes: ClassVar[str] = "distances grow slower beyond a window"

    window: int | None = None
    """Distance in tokens up to which nothing changes, `w`; by default half the trained length."""
    slope: float = 16.0
    """How many tokens beyond the window count as one, `k`, at least 1."""

    def __post_init__(self) -> None:
        check_number("slope", self.slope, at_least=1.0)
        keep_whole(self, "window")

    def spans(self, rope: Rope) -> list[Span]:
        window, slope = self.window or half(rope), self.slope
        query = rope.positions(lambda m: (m + window * (slope - 1)) / slope)
        return [within(window), beyond(window, query, rope.positions(lambda n: n / slope))]

    def reach(self, rope: Rope) -> int:
        window = self.window or half(rope)
        return max(int(self.slope * (rope.trained_length - window) + window), rope.trained_length)
