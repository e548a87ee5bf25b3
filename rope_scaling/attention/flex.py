"""Attention from spans through FlexAttention: one block mask a span, and the same exact merge. For CUDA.

Everything is differentiable as it stands, the log-sum-exp included, so there is no backward pass of our own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from rope_scaling.attention.plan import Plan, turn


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
        plan (`Plan`): Spans, positions and turns.
        scaling (`float`): Multiplier of scores.
        softcap (`float`, *optional*): Scores `s` become `c tanh(s / c)`.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.

    Returns:
        `torch.Tensor`: `[B, H, T, dv]`; rows that belong to no segment are 0.
    """
    parts = []
    for index, span in enumerate(plan.spans):
        turned = _turned(query, plan, span, True), _turned(key, plan, span, False)
        parts.append(one_span(*turned, value, _block_mask(plan, index, query, key), scaling, softcap))
    return merged(parts, sinks).to(query.dtype)


def one_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the keys of one span, turned already."""
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


def _turned(x: torch.Tensor, plan: Plan, span: Any, is_query: bool) -> torch.Tensor:
    """Queries or keys of all segments at the angles of a span."""
    if is_query and plan.temperature is None and span.query is None and span.amplitude is None:
        return x
    if not is_query and span.key is None:
        return x
    turned = x.clone()
    for segment in plan.segments:
        where = segment.queries if is_query else segment.keys
        part = x[segment.rows, :, where]
        rotation = plan.query_rotation(segment, span) if is_query else plan.key_rotation(segment, span)
        part = turn(part, rotation, plan.layout)
        gain = plan.query_gain(segment) if is_query else None
        if gain is not None:
            part = (part * gain[:, None].to(part.device)).to(part.dtype)
        turned[segment.rows, :, where] = part
    return turned


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
        low, high = first.to(query.device), last.to(query.device)

        def seen(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (k >= low[row, q]) & (k <= high[row, q])

        plan.memo[name] = create_block_mask(seen, rows, None, length, key.shape[2], device=query.device.type)
    return plan.memo[name]
