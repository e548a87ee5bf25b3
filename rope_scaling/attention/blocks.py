"""Cutting the spans of a segment into few large kernel calls, for devices where a call is expensive and memory is not.

The CPU engine cuts into tiles that fit a cache (`tiling.py`). Here blocks are as large as they come, and equal
blocks at equal steps, such as the chunks of a window or of dual chunk attention, become the batch of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.tiling import runs
from rope_scaling.spans import Span


LARGEST_BATCH = 32768
"""Queries of a batched call, so that its output stays small beside that of the layer."""

NativeBand = Callable[[int, int], bool]
"""From the width of a band and its number of queries to whether one kernel call computes it."""


@dataclass(frozen=True, slots=True)
class Block:
    """One kernel call: `count` blocks of queries against as many blocks of keys.

    Shapes: `full` (every query sees all keys of the block), `causal` (query `i` sees keys up to `i`; as many keys as
    queries), `reversed` (keys from `i` on; as many keys as queries), `band` (keys from `i` on, `keys - queries + 1`
    of them each).
    """

    span: int
    """Index of the span."""
    shape: str
    begin: int
    """First query of the first block, in the segment."""
    queries: int
    """Queries of a block."""
    first: int
    """First key of the first block, in the segment."""
    keys: int
    """Keys of a block."""
    count: int = 1
    query_step: int = 0
    """Queries from one block to the next, at least `queries`."""
    key_step: int = 0
    """Keys from one block to the next, at least `keys`."""
    is_first: bool = False
    """Whether no earlier call has any of these queries, so that there is nothing to merge with."""

    @property
    def end(self) -> int:
        """Last query + 1."""
        return self.begin + (self.count - 1) * self.query_step + self.queries

    @property
    def key_end(self) -> int:
        """Last key + 1."""
        return self.first + (self.count - 1) * self.key_step + self.keys


def make_blocks(segment: Segment, spans: list[Span], native_band: NativeBand) -> list[Block]:
    """The kernel calls of a segment, span by span; each pair of query and key that a span covers is in exactly one.

    Args:
        segment (`Segment`): Positions of queries and keys.
        spans (`list[Span]`): The spans of a layer.
        native_band (callable): Whether a band of a width and a number of queries goes through one call; others are
            cut into triangles.
    """
    blocks: list[Block] = []
    for index, span in enumerate(spans):
        first, last = segment.bounds(span)
        single = [
            block for begin, end in runs(first, last) for block in _cut(index, begin, end, first, last, native_band)
        ]
        for shape in ("causal", "band", "full", "reversed"):
            # The first blocks of all are what others are merged into: in one call where they can be.
            most = LARGEST_BATCH if blocks else len(segment.positions)
            blocks.extend(_batched([block for block in single if block.shape == shape], most))
    return _marked(blocks, len(segment.positions))


def _cut(
    span: int, begin: int, end: int, first: torch.Tensor, last: torch.Tensor, native_band: NativeBand
) -> Iterator[Block]:
    """A run of queries over which each end stays or moves one key a query, as rectangles, triangles and bands."""
    low, low_end = int(first[begin]), int(first[end - 1])
    high, high_end = int(last[begin]), int(last[end - 1])
    length = end - begin
    if length == 1 or low_end == low:
        if high_end == high:
            yield Block(span, "full", begin, length, low, high - low + 1)
            return
        if high > low:
            yield Block(span, "full", begin, length, low, high - low)
        yield Block(span, "causal", begin, length, high, length)
        return
    if high_end == high:
        if high > low_end:
            yield Block(span, "full", begin, length, low_end + 1, high - low_end)
        yield Block(span, "reversed", begin, length, low, length)
        return
    width = high - low + 1
    if native_band(width, length):
        yield Block(span, "band", begin, length, low, length + width - 1)
        return
    for start in range(0, length, width):
        size = min(width, length - start)
        yield Block(span, "causal", begin + start, size, high + start, size)
        if width > size:
            yield Block(span, "full", begin + start, size, low + start + size - 1, width - size)
        if size > 1:
            yield Block(span, "reversed", begin + start, size - 1, low + start, size - 1)


def _batched(blocks: list[Block], largest: int) -> Iterator[Block]:
    """Joins consecutive equal blocks at equal steps that share no query and no key."""
    blocks = sorted(blocks, key=lambda block: (block.queries, block.keys, block.begin))
    start = 0
    while start < len(blocks):
        base = blocks[start]
        most = max(largest // base.queries, 1)
        query_step = key_step = count = 1
        for block in blocks[start + 1 : start + most]:
            steps = block.begin - blocks[start + count - 1].begin, block.first - blocks[start + count - 1].first
            if count == 1:
                query_step, key_step = steps
            apart = query_step >= base.queries and key_step >= base.keys
            if (
                (block.queries, block.keys) != (base.queries, base.keys)
                or steps != (query_step, key_step)
                or not apart
            ):
                break
            count += 1
        yield base if count == 1 else replace(base, count=count, query_step=query_step, key_step=key_step)
        start += count


def _marked(blocks: list[Block], length: int) -> list[Block]:
    """Marks the blocks whose queries no earlier block has."""
    taken = torch.zeros(length, dtype=torch.bool)
    marked = []
    for block in blocks:
        starts = torch.arange(block.count) * block.query_step + block.begin
        where = (starts[:, None] + torch.arange(block.queries)).flatten()
        marked.append(replace(block, is_first=not bool(taken[where].any())))
        taken[where] = True
    return marked
