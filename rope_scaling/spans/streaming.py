"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rope_scaling.spans.base import Rope, Span, SpanMethod, within
from rope_scaling.spans.sliding_window import any_length, check_sinks, keep_sinks, sinks


@dataclass(frozen=True, kw_only=True)
class Streaming(SpanMethod):
    """Attention sinks and a window, with positions counted inside the cache
    ([StreamingLLM](https://huggingface.co/papers/2309.17453)).

    The cache holds the first `num_sinks` and the last `window` keys. A key's position is its place in the cache, so a
    sink `n` is seen from `num_sinks + window - 1`, at the distance it would have if nothing lay between. Memory and
    time a token stay constant, and the model forgets what left the window: it reads on for ever, not further back.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.17453"
    changes: ClassVar[str] = "the last keys, sinks, cache positions"
    decides: ClassVar[frozenset[str]] = frozenset({"map", "window"})

    window: int | None = None
    """Last keys that are kept; by default what the trained length holds beside the sinks."""
    num_sinks: int = 4
    """First keys of the text that are kept."""

    def __post_init__(self) -> None:
        keep_sinks(self, at_least=1)

    def spans(self, rope: Rope) -> list[Span]:
        num_sinks, window = self.retained(rope)
        check_sinks(window, num_sinks)
        newest = num_sinks + window - 1
        return [within(window), sinks(num_sinks, window, rope.positions(lambda m: m.clamp(max=newest)))]

    def reach(self, rope: Rope) -> int | None:
        return any_length(rope, sum(self.retained(rope)))

    def retained(self, rope: Rope) -> tuple[int, int]:
        return self.num_sinks, self.window or max(rope.trained_length - self.num_sinks, 1)
