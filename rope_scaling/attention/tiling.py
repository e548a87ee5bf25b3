"""Cutting spans into rectangles and triangles that stock attention kernels compute without a mask.

Within a run of queries over which each end of an interval stays or moves by one key per query, a span is a rectangle
that all of these queries see, and at each moving end a triangle. A triangle at the far end is causal attention; one at
the near end is causal attention with queries and keys in reverse.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from rope_scaling.attention.sequences import Segment
from rope_scaling.spans import Angles, Span


TILE = 2112
"""Queries of a tile. On the CPU half or twice as many take the same time (`benchmarks/levers.py`)."""
CHAIN_TILE = 2304
"""The same where spans are rotated one from another, which begins again with every tile."""
CUTS = ((64, 32), (384, 64), (math.inf, 192))
"""Keys of a band, the interval that moves with the query at both ends, and up to there queries of a cut of it. All
cuts go through one kernel call, under one mask; the wider a cut, the more of it is masked, and from 192 queries on
the kernel itself is faster (`benchmarks/levers.py`)."""
WIDEST_BAND = 2048
"""Up to this many keys a masked band beats a rectangle and two triangles, whose results have to be merged."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One kernel call: queries `begin .. end - 1` against keys `first .. last - 1` of a segment."""

    span: int
    shape: str
    """`full`, `causal` (query `i` sees keys up to `i`), `reversed` (keys from `i` on) or `band` (keys from `i` on,
    the same number each)."""
    begin: int
    end: int
    first: int
    last: int
    cut: int = 0
    """For a band: queries of a cut. Cut `i` sees the keys `i * cut` further on."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The kernel calls of a segment, tile by tile: first query, last query + 1, pieces."""

    tiles: list[tuple[int, int, list[Piece]]]

    def reach(self, spans: list[Span], key: Angles | None) -> int:
        """How many keys are covered by the spans that rotate them by `key`."""
        pieces = (piece for _, _, tile in self.tiles for piece in tile)
        return max((piece.last for piece in pieces if spans[piece.span].key is key), default=0)


def make_schedule(segment: Segment, spans: list[Span], tile: int | None = None) -> Schedule:
    """Cuts every span of a segment; each pair of query and key that a span holds is in exactly one piece."""
    length = len(segment.positions)
    tile = tile or (CHAIN_TILE if any(span.after is not None for span in spans) else TILE)
    bounds = [segment.bounds(span) for span in spans]
    opening = _opening(bounds)
    edges = [*([0] if opening else []), *range(opening, length, tile), length]
    tiles: list[tuple[int, int, list[Piece]]] = [(begin, end, []) for begin, end in pairwise(edges)]
    for index, (first, last) in enumerate(bounds):
        for begin, end in runs(first, last):
            at = bisect_right(edges, begin) - 1
            while begin < end:
                stop = min(end, edges[at + 1])
                tiles[at][2].extend(_pieces(index, begin, stop, first, last))
                begin, at = stop, at + 1
    return Schedule(tiles)


def _opening(bounds: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """How many queries, from the first on, see everything before them through one span and nothing through others.

    They go through one call of the kernel that the model itself would use, and get the very bits that it would give.
    """
    length = len(bounds[0][0])
    positions, plain, others = torch.arange(length), [], []
    for first, last in bounds:
        seen = first <= last
        plain.append(seen & (first == 0) & (last == positions))
        others.append(seen & ~plain[-1])
    alone = (torch.stack(plain).sum(0) == 1) & ~torch.stack(others).any(0)
    # All through the same span: the one that the first query is in.
    alone &= plain[int(torch.stack(plain)[:, 0].int().argmax())]
    return length if bool(alone.all()) else int((~alone).int().argmax())


def runs(first: torch.Tensor, last: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Runs of queries that see something, over which both ends keep their pace."""
    if len(first) == 1:
        if int(first) <= int(last):
            yield 0, 1
        return
    steps = torch.stack([first.diff(), last.diff()])
    even = ((steps == 0) | (steps == 1)).all(0)
    # A step that is neither is a run of its own.
    pace = torch.where(even, steps[0] * 2 + steps[1], -torch.arange(1, len(first)))
    changes = ((pace.diff() != 0).nonzero()[:, 0] + 1).tolist()
    for begin, stop in _stretches(first <= last):
        while begin < stop:
            after = bisect_right(changes, begin)
            same_until = changes[after] if after < len(changes) else len(first) - 1
            end = min(same_until + 1, stop) if begin < len(pace) and bool(even[begin]) else begin + 1
            yield begin, end
            begin = end


def _stretches(true: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Begin and end of every stretch of consecutive true entries."""
    padded = torch.nn.functional.pad(true.int(), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    yield from zip(edges[0::2], edges[1::2], strict=True)


def _pieces(span: int, begin: int, end: int, first: torch.Tensor, last: torch.Tensor) -> Iterator[Piece]:
    """A run as a rectangle and the triangles at its moving ends, or, where both ends move over few keys, as bands."""
    low, low_end = int(first[begin]), int(first[end - 1])
    high, high_end = int(last[begin]), int(last[end - 1])
    width = high - low + 1
    if low_end > low and high_end > high and (width <= WIDEST_BAND or low_end > high + 1):
        size = next(size for widest, size in CUTS if width <= widest)
        for cut in _even_cuts(begin, end, size):
            yield Piece(span, "band", *cut, low + cut[0] - begin, high_end - (end - cut[1]) + 1, size)
        return
    if low_end > low:
        yield Piece(span, "reversed", begin, end - 1, low, low_end)
    if high_end > high:
        yield Piece(span, "causal", begin, end, high, high_end + 1)
        high -= 1
    if low_end <= high:
        yield Piece(span, "full", begin, end, low_end, high + 1)


def _even_cuts(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """All whole cuts of `size` as one range, and the rest."""
    whole = begin + (end - begin) // size * size
    if whole > begin:
        yield begin, whole
    if whole < end:
        yield whole, end
