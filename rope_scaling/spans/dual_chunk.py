"""Dual chunk attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import RopeScalingError, keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, causal


@dataclass(frozen=True, kw_only=True)
class DualChunk(SpanMethod):
    """Positions restart in chunks; the chunk before keeps its order, older ones are held at one position
    ([paper](https://huggingface.co/papers/2402.17463)).

    With chunks of `N = chunk_size - local_size` tokens, a query at place `a` of its chunk and a key at place `k` of
    its own meet at `a - k` in the same chunk, at `min(a + N, chunk_size) - k` when the key's chunk is the one before,
    and at `min(2N - 1, chunk_size) - k` when it is older. The authors' code also multiplies by a temperature that
    follows the length of the call; combine with `log_n` for one that follows the position.
    """

    name: ClassVar[str] = "dual_chunk"
    paper: ClassVar[str] = "https://huggingface.co/papers/2402.17463"
    changes: ClassVar[str] = "positions in chunks, older chunks held"

    chunk_size: int | None = None
    """Positions in use, `c`, in tokens; by default three quarters of the trained length."""
    local_size: int | None = None
    """Tokens before a chunk's begin that stay at their true distance at least; by default an eighth."""

    def __post_init__(self) -> None:
        keep_whole(self, "chunk_size", "local_size")

    def spans(self, rope: Rope) -> list[Span]:
        capacity = self.chunk_size or max(3 * rope.trained_length // 4, 2)
        local = self.local_size or max(rope.trained_length // 8, 1)
        if local >= capacity or capacity > rope.trained_length:
            raise RopeScalingError(
                f"`local_size` is {local} and `chunk_size` {capacity}: the first must be smaller than the second, and "
                f"that no larger than the trained length of {rope.trained_length}."
            )
        chunk = capacity - local

        def start(m: torch.Tensor) -> torch.Tensor:
            return m // chunk * chunk

        def before(m: torch.Tensor) -> torch.Tensor:
            return (start(m) - chunk).clamp(min=0)

        return [
            Span(first=start, last=causal),
            Span(
                first=before,
                last=lambda m: start(m) - 1,
                query=rope.positions(lambda m: torch.minimum(m, before(m) + capacity)),
            ),
            Span(
                first=torch.zeros_like,
                last=lambda m: start(m) - chunk - 1,
                query=rope.positions(lambda m: m * 0 + min(2 * chunk - 1, capacity)),
                key=rope.positions(lambda n: n % chunk),
            ),
        ]
