"""A sliding window, with or without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_count, keep_whole
from rope_scaling.spans.base import Angles, Rope, Span, SpanMethod, within


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(SpanMethod):
    """Every query sees the last `window` keys, and the first `num_sinks` of the text, all at their true distance
    ([Longformer](https://huggingface.co/papers/2004.05150); sinks: [StreamingLLM](https://huggingface.co/papers/2309.17453)).

    Sinks keep their true distance, which beyond the trained length rotates them to angles the model never met;
    `lm_infinite` and `streaming` do not.
    """

    name: ClassVar[str] = "sliding_window"
    paper: ClassVar[str] = "https://huggingface.co/papers/2004.05150"
    changes: ClassVar[str] = "the last keys only, and sinks"
    decides: ClassVar[frozenset[str]] = frozenset({"window"})

    window: int | None = None
    """Keys that a query sees, its own included; by default the trained length."""
    num_sinks: int = 0
    """First keys of the text that every query sees as well."""

    def __post_init__(self) -> None:
        keep_sinks(self)

    def spans(self, rope: Rope) -> list[Span]:
        num_sinks, window = self.retained(rope)
        check_sinks(window, num_sinks)
        return [within(window), sinks(num_sinks, window)] if num_sinks else [within(window)]

    def reach(self, rope: Rope) -> int | None:
        num_sinks, window = self.retained(rope)
        return rope.trained_length if num_sinks else any_length(rope, window)

    def retained(self, rope: Rope) -> tuple[int, int]:
        return self.num_sinks, self.window or rope.trained_length


def any_length(rope: Rope, farthest: int) -> int | None:
    """`None` (any length) for a method whose distances end at `farthest`, unless that itself is beyond training."""
    return None if farthest <= rope.trained_length else rope.trained_length


def keep_sinks(method: SpanMethod, at_least: int = 0) -> None:
    """Raises `RopeScalingError` unless `window` is positive, and `num_sinks` less than it but as many as needed."""
    keep_whole(method, "num_sinks", check=check_count)
    keep_whole(method, "window")
    window, num_sinks = method.window, method.num_sinks  # type: ignore[attr-defined]
    if num_sinks < at_least:
        raise RopeScalingError(
            f"`num_sinks` must be at least {at_least}; got {num_sinks}. For a window without sinks use "
            "`sliding_window`"
        )
    if window is not None:
        check_sinks(window, num_sinks)


def check_sinks(window: int, num_sinks: int) -> None:
    """Raises `RopeScalingError` unless a window holds more keys than there are sinks."""
    if num_sinks >= window:
        raise RopeScalingError(
            f"`num_sinks` is {num_sinks} and `window` {window}: sinks are the few first keys that a window leaves "
            "behind, so there must be fewer of them than the window holds. Give 4, or a wider window."
        )


def sinks(num_sinks: int, window: int, query: Angles | None = None, key: Angles | None = None) -> Span:
    """The first `num_sinks` keys, for queries whose window has moved past them."""

    def last(positions: torch.Tensor) -> torch.Tensor:
        return (positions - window).clamp(max=num_sinks - 1)

    return Span(first=torch.zeros_like, last=last, query=query, key=key)
