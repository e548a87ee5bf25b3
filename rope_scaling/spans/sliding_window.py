"""A sliding window, with or without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, check_count, check_length
from rope_scaling.spans.base import Rope, Span, SpanMethod, within


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(SpanMethod):
    """Every query sees the last `window` keys, and the first `num_sinks` of the text, all at their true distance
    ([Longformer](https://huggingface.co/papers/2004.05150); sinks: [StreamingLLM](https://huggingface.co/papers/2309.17453)).

    Sinks keep their true distance here, as Transformers' own sliding layers would have it. Far beyond the trained
    length that turns them to angles the model never met; `lm_infinite` and `streaming` do not.
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
        check_sinks(self.window, self.num_sinks)

    def spans(self, rope: Rope) -> list[Span]:
        window = self.window or rope.trained_length
        return window_spans(window, sinks(self.num_sinks, window) if self.num_sinks else None)

    def retained(self, rope: Rope) -> tuple[int, int]:
        return self.num_sinks, self.window or rope.trained_length


def check_sinks(window: int | None, num_sinks: int) -> None:
    """Raises `RopeScalingError` unless a window is positive and holds more keys than there are sinks."""
    check_count("num_sinks", num_sinks)
    if window is not None and num_sinks >= check_length("window", window):
        raise RopeScalingError(
            f"`num_sinks` is {num_sinks} and `window` {window}: sinks are the few first keys that a window leaves "
            "behind, so there must be fewer of them than the window holds. Give 4, or a wider window."
        )


def sinks(num_sinks: int, window: int, **angles: object) -> Span:
    """The first `num_sinks` keys, for queries whose window has moved past them."""

    def last(positions: torch.Tensor) -> torch.Tensor:
        return (positions - window).clamp(max=num_sinks - 1)

    return Span(first=torch.zeros_like, last=last, **angles)  # type: ignore[arg-type]


def window_spans(window: int, sink: Span | None) -> list[Span]:
    """A window of the last keys, and the sinks before it."""
    return [within(window)] if sink is None else [within(window), sink]
