"""Attention from spans through FlexAttention: one block mask per span, and the same exact merge. For CUDA.

It computes what the stock kernels do not (soft-capped scores, values of another width than keys), and is what a
compiler takes whole. What depends on the positions of a call (bounds of the spans, rotations, temperatures) is then
computed outside of the graph, by one operator. Everything is differentiable, the log-sum-exp included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from rope_scaling.attention.plan import Plan, apply_rotation
from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.spans import Span


_BLOCK = 128
"""Queries and keys of a block of a mask."""


def flex_span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as the spans define it; compiled on a GPU, and by FlexAttention's own dense form elsewhere.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`.
        value (`torch.Tensor`): `[B, Hk, S, dv]`.
        plan (`Plan`): Spans, positions and rotations.
        scaling (`float`): Multiplier of scores.
        softcap (`float`, *optional*): Scores `s` become `c tanh(s / c)`.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.

    Returns:
        `torch.Tensor`: `[B, H, T, dv]`; rows that belong to no segment are 0.
    """
    parts = []
    for index, span in enumerate(plan.spans):
        rotated = _rotated(query, plan, span, True), _rotated(key, plan, span, False)
        parts.append(one_span(*rotated, value, _block_mask(plan, index, query, key), scaling, softcap))
    return merged(parts, sinks).to(query.dtype)


def one_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the keys of one span, rotated already."""
    out, aux = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_capped(softcap),
        block_mask=block_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


def merged(parts: list[tuple[torch.Tensor, torch.Tensor]], sinks: torch.Tensor | None) -> torch.Tensor:
    """The exact output from those of all spans, each with its log-sum-exp."""
    lse = torch.logsumexp(torch.stack([its for _, its in parts]), 0)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse)[None, :, None])
    # Where a query sees nothing in a span, both are -inf and its share is 0.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    shares = [torch.exp(its - lse)[..., None] for _, its in parts]
    return sum(out * share for (out, _), share in zip(parts, shares, strict=True))  # type: ignore[return-value]


def _kernel(device: str) -> Any:
    # In a graph that is being compiled, FlexAttention is compiled with the rest.
    return flex_attention if device != "cuda" or torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _soft_capped(softcap: float) -> Any:
    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _rotated(x: torch.Tensor, plan: Plan, span: Any, is_query: bool) -> torch.Tensor:
    """Queries or keys of all segments at the angles of a span."""
    if is_query and plan.temperature is None and span.query is None and span.amplitude is None:
        return x
    if not is_query and span.key is None:
        return x
    rotated = x.clone()
    for segment in plan.segments:
        where = segment.queries if is_query else segment.keys
        part = x[segment.rows, :, where]
        rotation = plan.query_rotation(segment, span) if is_query else plan.key_rotation(segment, span)
        part = apply_rotation(part, rotation, plan.layout)
        gain = plan.query_gain(segment) if is_query else None
        if gain is not None:
            part = (part * gain[:, None].to(part.device)).to(part.dtype)
        rotated[segment.rows, :, where] = part
    return rotated


def _block_mask(plan: Plan, index: int, query: torch.Tensor, key: torch.Tensor) -> BlockMask:
    """The keys between a span's bounds, for every row of the batch."""
    name = ("flex", index, query.device)
    if name not in plan.memo:
        rows, length = query.shape[0], query.shape[2]
        first = torch.ones(rows, length, dtype=torch.long)
        last = torch.zeros(rows, length, dtype=torch.long)
        for segment in plan.segments:
            low, high = segment.bounds(plan.spans[index])
            first[segment.rows, segment.queries] = low + segment.keys.start
            last[segment.rows, segment.queries] = high + segment.keys.start
        plan.memo[name] = block_mask(first.to(query.device), last.to(query.device), key.shape[2])
    return plan.memo[name]  # type: ignore[no-any-return]


def block_mask(first: torch.Tensor, last: torch.Tensor, keys: int) -> BlockMask:
    """The keys between two bounds of every query, from the bounds alone: no table of queries and keys is made.

    Args:
        first (`torch.Tensor`): First key that a query sees, `[B, T]`, int64.
        last (`torch.Tensor`): Last one; before the first for queries that see none.
        keys (`int`): Keys there are, `S`.
    """
    length = first.shape[1]
    padding = -length % _BLOCK
    low = torch.nn.functional.pad(first, (0, padding), value=1).unflatten(1, (-1, _BLOCK))
    high = torch.nn.functional.pad(last, (0, padding), value=0).unflatten(1, (-1, _BLOCK))
    sees = low <= high
    begin = torch.arange(0, keys, _BLOCK, device=first.device)
    end = (begin + _BLOCK - 1).clamp(max=keys - 1)
    nearest = torch.where(sees, high, -1).amax(-1, keepdim=True)
    farthest = torch.where(sees, low, keys).amin(-1, keepdim=True)
    touched = (end >= farthest) & (begin <= nearest)  # [B, blocks of queries, blocks of keys]
    whole = (begin >= low.amax(-1, keepdim=True)) & (begin + _BLOCK - 1 <= high.amin(-1, keepdim=True))
    whole &= sees.all(-1, keepdim=True)
    kinds = [_block_list(touched & ~whole), _block_list(touched & whole)]

    def seen(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k >= first[row, q]) & (k <= last[row, q])

    return BlockMask.from_kv_blocks(*kinds[0], *kinds[1], BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(length, keys))


def _block_list(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys are chosen for every block of queries, and which come first; `[B, 1, ...]`, int32."""
    order = torch.argsort((~chosen).int(), dim=-1, stable=True)
    return chosen.sum(-1).int()[:, None], order.int()[:, None].contiguous()


def tables(plan: Plan, rows: int, length: int, keys: int) -> tuple[torch.Tensor, ...]:
    """A plan as tensors of fixed shape, on the CPU.

    Returns:
        `tuple`: first and last key of every query, `[spans, 2, rows, length]` (int64; the last before the first for
        queries of no segment); query rotations as gain times cosine and sine, `[spans, 2, rows, length, R / 2]`,
        and keys, `[spans, 2, rows, keys, R / 2]` (float32); the queries' temperature, `[rows, length]` (float32).
    """
    spans, pairs = len(plan.spans), len(plan.inv_freq)
    bounds = torch.zeros(spans, 2, rows, length, dtype=torch.long)
    bounds[:, 0] = 1
    of_queries, of_keys = _no_rotation(spans, rows, length, pairs), _no_rotation(spans, rows, keys, pairs)
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


def _no_rotation(spans: int, rows: int, length: int, pairs: int) -> torch.Tensor:
    rotations = torch.zeros(spans, 2, rows, length, pairs)
    rotations[:, 0] = 1
    return rotations


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
        spans: list[Span], layout: RotaryLayout, has_temperature: bool, found: tuple[torch.Tensor, ...]
    ) -> TracedSpans:
        """From the tensors that `tables` gave, on the device of the model."""
        bounds, queries, keys, gains = found
        masks = [block_mask(low, high, keys.shape[3]) for low, high in (bounds[index] for index in range(len(spans)))]
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
            rotates_query = span.query is not None or span.amplitude is not None
            q = rotate_by(query, self.queries[index], self.layout) if rotates_query else query
            k = rotate_by(key, self.keys[index], self.layout) if span.key is not None else key
            parts.append(one_span(q, k, value, self.block_masks[index], scaling, softcap))
        return merged(parts, sinks).to(query.dtype)


def rotate_by(x: torch.Tensor, rotations: torch.Tensor, layout: RotaryLayout) -> torch.Tensor:
    """`x` (`[B, H, T, d]`) rotated by gain times cosine and sine of rows, positions and pairs, `[2, B, T, R / 2]`."""
    cos, sin = rotations[0][:, None], rotations[1][:, None]
    one, two = (pair.to(torch.promote_types(x.dtype, cos.dtype)) for pair in layout.pairs(x, 0, cos.shape[-1]))
    one, two = one * cos - two * sin, two * cos + one * sin
    if layout.backward:
        one, two = two, one
    rotated = torch.stack([one, two], -1).flatten(-2) if layout.interleaved else torch.cat([one, two], -1)
    end = layout.start + layout.rotary_dim
    return torch.cat([x[..., : layout.start], rotated.to(x.dtype), x[..., end:]], -1)
