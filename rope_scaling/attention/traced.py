"""A layer's spans as tensors, and attention from them that a compiler takes whole, through FlexAttention.

What depends on the positions of a call (the bounds of every span, the turns of queries and keys, temperatures) is
worked out outside of the graph, by one operator; everything that touches queries, keys and values is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rope_scaling.attention.flex import merged, one_span
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.rotary import RotaryLayout, Rotation
from rope_scaling.spans import Span


def tables(plan: Plan, rows: int, length: int, keys: int) -> tuple[torch.Tensor, ...]:
    """A plan as tensors of fixed shape, on the CPU.

    Returns:
        `tuple`: first and last key of every query, `[spans, 2, rows, length]` (int64; the last before the first for
        queries of no segment); gain times cosine and sine of what turns queries, `[spans, 2, rows, length, R / 2]`,
        and keys, `[spans, 2, rows, keys, R / 2]` (float32); the queries' temperature, `[rows, length]` (float32).
    """
    spans, pairs = len(plan.spans), len(plan.inv_freq)
    bounds = torch.zeros(spans, 2, rows, length, dtype=torch.long)
    bounds[:, 0] = 1
    of_queries, of_keys = _no_turn(spans, rows, length, pairs), _no_turn(spans, rows, keys, pairs)
    gains = torch.ones(rows, length)
    for segment in plan.segments:
        for index, span in enumerate(plan.spans):
            for end, values in enumerate(segment.bounds(span)):
                bounds[index, end, segment.rows, segment.queries] = values + segment.keys.start
            _fill(of_queries[index, :, segment.rows, segment.queries], plan.query_rotation(segment, span))
            _fill(of_keys[index, :, segment.rows, segment.keys], plan.key_rotation(segment, span))
        gain = plan.query_gain(segment)
        if gain is not None:
            gains[segment.rows, segment.queries] = gain.float()
    return bounds, of_queries, of_keys, gains


def shapes(spans: int, pairs: int, rows: int, length: int, keys: int) -> list[tuple[list[int], torch.dtype]]:
    """Shapes and dtypes of what `tables` gives."""
    return [
        ([spans, 2, rows, length], torch.long),
        ([spans, 2, rows, length, pairs], torch.float32),
        ([spans, 2, rows, keys, pairs], torch.float32),
        ([rows, length], torch.float32),
    ]


def _no_turn(spans: int, rows: int, length: int, pairs: int) -> torch.Tensor:
    turns = torch.zeros(spans, 2, rows, length, pairs)
    turns[:, 0] = 1
    return turns


def _fill(into: torch.Tensor, rotation: Rotation | None) -> None:
    if rotation is not None:
        high = rotation.low + rotation.cos.shape[-1]
        into[0, ..., rotation.low : high], into[1, ..., rotation.low : high] = rotation.cos, rotation.sin


@dataclass(frozen=True, eq=False)
class TracedSpans:
    """The spans of layers that attend alike, in one call, as a graph holds them."""

    spans: list[Span]
    layout: RotaryLayout
    has_temperature: bool
    block_masks: list[BlockMask]
    queries: torch.Tensor
    keys: torch.Tensor
    gains: torch.Tensor

    @staticmethod
    def made(
        spans: list[Span], layout: RotaryLayout, has_temperature: bool, found: tuple[torch.Tensor, ...], device: str
    ) -> TracedSpans:
        """From the tensors that `tables` gave, on the device of the model."""
        bounds, queries, keys, gains = found
        rows, length = gains.shape
        masks = [
            create_block_mask(_between(low, high), rows, None, length, keys.shape[3], device=device)
            for low, high in (bounds[index] for index in range(len(spans)))
        ]
        return TracedSpans(spans, layout, has_temperature, masks, queries, keys, gains)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `flex_span_attention`, `[B, H, T, dv]`."""
        if self.has_temperature:
            query = (query * self.gains[:, None, :, None]).to(query.dtype)
        parts = []
        for index, span in enumerate(self.spans):
            turns_query = span.query is not None or span.amplitude is not None
            q = turn_by(query, self.queries[index], self.layout) if turns_query else query
            k = turn_by(key, self.keys[index], self.layout) if span.key is not None else key
            parts.append(one_span(q, k, value, self.block_masks[index], scaling, softcap))
        return merged(parts, sinks).to(query.dtype)


def _between(low: torch.Tensor, high: torch.Tensor):  # type: ignore[no-untyped-def]
    def seen(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k >= low[row, q]) & (k <= high[row, q])

    return seen


def turn_by(x: torch.Tensor, turns: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """`x` (`[B, H, T, d]`) turned by gain times cosine and sine of rows, positions and pairs, `[2, B, T, R / 2]`."""
    cos, sin = turns[0][:, None], turns[1][:, None]
    one, two = (pair.to(torch.promote_types(x.dtype, cos.dtype)) for pair in layout.pairs(x, 0, cos.shape[-1]))
    one, two = one * cos - two * sin, two * cos + one * sin
    if layout.backward:
        one, two = two, one
    turned = torch.stack([one, two], -1).flatten(-2) if layout.interleaved else torch.cat([one, two], -1)
    end = layout.start + layout.rotary_dim
    return torch.cat([x[..., : layout.start], turned.to(x.dtype), x[..., end:]], -1)
