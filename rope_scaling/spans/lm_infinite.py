"""LM-Infinite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rope_scaling.spans.base import Rope, Span, SpanMethod, within
from rope_scaling.spans.sliding_window import any_length, check_sinks, keep_sinks, sinks


@dataclass(frozen=True, kw_only=True)
class LmInfinite(SpanMethod):
    """A window of the last keys, and the first keys of the text at one constant distance
    ([paper](https://huggingface.co/papers/2308.16137)).

    `rho(D) = D` for `D < window`; for the first `num_sinks` keys beyond it `rho = window`. The paper's optional
    fetching of middle keys by their score is not part of this.
    """

    name: ClassVar[str] = "lm_infinite"
    paper: ClassVar[str] = "https://huggingface.co/papers/2308.16137"
    changes: ClassVar[str] = "the last keys, the first at one distance"
    decides: ClassVar[frozenset[str]] = frozenset({"map", "window"})

    window: int | None = None
    """Keys that a query sees at their true distance; by default the trained length."""
    num_sinks: int = 10
    """First keys of the text that every query sees, 10 to 100 in the paper."""

    def __post_init__(self) -> None:
        keep_sinks(self, at_least=1)

    def spans(self, rope: Rope) -> list[Span]:
        num_sinks, window = self.retained(rope)
        check_sinks(window, num_sinks)
        held, still = rope.positions(lambda m: m * 0 + window), rope.positions(lambda n: n * 0)
        return [within(window), sinks(num_sinks, window, held, still)]

    def reach(self, rope: Rope) -> int | None:
        return any_length(rope, self.retained(rope)[1])

    def retained(self, rope: Rope) -> tuple[int, int]:
        return self.num_sinks, self.window or rope.trained_length
