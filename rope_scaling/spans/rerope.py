"""ReRoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rope_scaling.errors import keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, beyond, within
from rope_scaling.spans.sliding_window import any_length


@dataclass(frozen=True, kw_only=True)
class ReRope(SpanMethod):
    """Distances saturate at a window ([kexue.fm 9708](https://kexue.fm/archives/9708)).

    `rho(D) = min(D, w)`. The author's code also scales the query by `log_n`; combine the two for that.
    """

    name: ClassVar[str] = "rerope"
    paper: ClassVar[str] = "https://kexue.fm/archives/9708"
    changes: ClassVar[str] = "distances saturate at a window"

    window: int | None = None
    """Distance in tokens at which all pairs stop rotating, `w`; by default half the trained length."""

    def __post_init__(self) -> None:
        keep_whole(self, "window")

    def spans(self, rope: Rope) -> list[Span]:
        window = self.window or half(rope)
        held, still = rope.positions(lambda m: m * 0 + window), rope.positions(lambda n: n * 0)
        return [within(window), beyond(window, held, still)]

    def reach(self, rope: Rope) -> int | None:
        return any_length(rope, self.window or half(rope))


def half(rope: Rope) -> int:
    """Half the trained length, in tokens."""
    return max(rope.trained_length // 2, 1)
