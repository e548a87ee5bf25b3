"""Attention from spans in blocks of queries, for what no fused kernel computes: dropout on probabilities, soft-capped
scores, values of another width than keys, and devices without such kernels. Slow, with memory linear in the length.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from rope_scaling.attention.fused import rotate
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.attention.sequences import Segment


_BLOCK = 256
"""Queries of a block."""


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, on any device; the backward pass computes each block's scores again.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`.
        value (`torch.Tensor`): `[B, Hk, S, dv]`.
        plan (`Plan`): Spans, positions and rotations.
        scaling (`float`): Multiplier of scores.
        dropout (`float`): Share of probabilities to drop.
        softcap (`float`, *optional*): Scores `s` become `c tanh(s / c)`.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.

    Returns:
        `torch.Tensor`: `[B, H, T, dv]`; rows that belong to no segment are 0.
    """
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    blocks = []
    for segment in plan.segments:
        q, v = query[segment.rows, :, segment.queries], value[segment.rows, :, segment.keys]
        k = key[segment.rows, :, segment.keys]
        bounds = [segment.bounds(span) for span in plan.spans]
        for begin in range(0, q.shape[2], _BLOCK):
            arguments = (plan, segment, bounds, begin, q, k, v, scaling, dropout, softcap, sinks)
            block = (
                checkpoint(_block, *arguments, use_reentrant=False) if torch.is_grad_enabled() else _block(*arguments)
            )
            blocks.append((segment, begin, block))
    # All at once at the end, so that autograd keeps no version of the output for each of them.
    for segment, begin, block in blocks:
        first = segment.queries.start + begin
        out[segment.rows, :, first : first + block.shape[2]] = block
    return out


def _rotate(x: torch.Tensor, rotation: Rotation | None, begin: int, end: int, layout: RotaryLayout) -> torch.Tensor:
    """Tokens `begin .. end - 1`, which are all of `x`, by their part of a rotation."""
    return rotate(x, rotation.part(begin, end).to(x.device) if rotation else None, layout)


def _block(
    plan: Plan,
    segment: Segment,
    bounds: list[tuple[torch.Tensor, torch.Tensor]],
    begin: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A block of queries, `[rows, H, n, dv]`: the scores of every span side by side under one softmax."""
    end = min(begin + _BLOCK, query.shape[2])
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // value.shape[1]
    query = query[:, :, begin:end]
    gain = plan.query_gain(segment)
    if gain is not None:
        query = query * gain[begin:end, None].to(query)
    scores, values = [], []
    for span, span_bounds in zip(plan.spans, bounds, strict=True):
        first, last = (bound[begin:end] for bound in span_bounds)
        sees = first <= last
        if not bool(sees.any()):
            continue
        low, high = int(first[sees].min()), int(last[sees].max()) + 1
        index = torch.arange(low, high)
        seen = (index >= first[:, None]) & (index <= last[:, None])
        queries = _rotate(query, plan.query_rotation(segment, span), begin, end, plan.layout)
        keys = _rotate(key[:, :, low:high], plan.key_rotation(segment, span), low, high, plan.layout)
        grouped = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # heads of a group as rows of one
        score = (grouped @ keys.transpose(-1, -2)).to(wide) * scaling
        score = score.unflatten(2, (groups, -1)).flatten(1, 2)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        scores.append(score.masked_fill(~seen.to(score.device), -torch.inf))
        values.append(value[:, :, low:high])
    if not values:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if sinks is not None:
        scores.append(sinks.to(wide)[None, :, None, None].expand(len(query), -1, end - begin, 1))
    row = torch.cat(scores, dim=-1)
    sees_nothing = (row == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.softmax(row.masked_fill(sees_nothing, 0), dim=-1).masked_fill(sees_nothing, 0)
    seen_keys = sum(part.shape[2] for part in values)
    probabilities = torch.dropout(probabilities[..., :seen_keys].to(value.dtype), dropout, dropout > 0)
    grouped = probabilities.unflatten(1, (-1, groups)).flatten(2, 3)
    return (grouped @ torch.cat(values, dim=2)).unflatten(2, (groups, -1)).flatten(1, 2)
