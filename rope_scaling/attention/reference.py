"""The law: attention from spans by its definition, dense, in any precision. Slow, and what everything is tested
against.

It also runs what fused kernels cannot: dropout on probabilities and soft-capped scores.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from rope_scaling.attention.plan import Plan, turn
from rope_scaling.attention.sequences import Segment


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, through a matrix of all scores.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`.
        value (`torch.Tensor`): `[B, Hk, S, dv]`.
        plan (`Plan`): Spans, positions and turns.
        scaling (`float`): Multiplier of scores.
        dropout (`float`): Share of probabilities to drop.
        softcap (`float`, *optional*): Scores `s` become `c tanh(s / c)`.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.
        block_size (`int`, *optional*): Queries whose scores are held at a time; all of them by default.

    Returns:
        `torch.Tensor`: `[B, H, T, dv]`; rows that belong to no segment are 0.
    """
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    pieces = []
    for segment in plan.segments:
        q = query[segment.rows, :, segment.queries]
        k, v = key[segment.rows, :, segment.keys], value[segment.rows, :, segment.keys]
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        step = block_size or q.shape[2]
        for begin in range(0, q.shape[2], step):
            arguments = (
                q,
                k,
                v,
                plan,
                segment,
                begin,
                min(begin + step, q.shape[2]),
                scaling,
                dropout,
                softcap,
                sinks,
            )
            block = (
                checkpoint(_block, *arguments, use_reentrant=False)
                if block_size and torch.is_grad_enabled()
                else _block(*arguments)
            )
            pieces.append((segment, begin, block))
    for segment, begin, block in pieces:
        first = segment.queries.start + begin
        out[segment.rows, :, first : first + block.shape[2]] = block
    return out


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    segment: Segment,
    begin: int,
    end: int,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Queries `begin .. end - 1` of a segment, `[rows, H, end - begin, dv]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q[:, :, begin:end]
    gain = plan.query_gain(segment)
    if gain is not None:
        q = q * gain[begin:end, None].to(q)
    scores = torch.full((*q.shape[:3], k.shape[2]), -torch.inf, dtype=wide, device=q.device)
    indices = torch.arange(k.shape[2])
    for span in plan.spans:
        first, last = segment.bounds(span)
        seen = (indices >= first[begin:end, None]) & (indices <= last[begin:end, None])
        rotation = plan.query_rotation(segment, span)
        turned = turn(q, rotation.part(begin, end) if rotation else None, plan.layout)
        keys = turn(k, plan.key_rotation(segment, span), plan.layout)
        its_scores = (turned @ keys.transpose(-1, -2)).to(wide) * scaling
        if softcap is not None:
            its_scores = softcap * torch.tanh(its_scores / softcap)
        scores = torch.where(seen.to(q.device), its_scores, scores)
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    seen_any = (scores > -torch.inf).any(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(~seen_any, 0), dim=-1) * seen_any
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    probabilities = torch.dropout(probabilities.to(v.dtype), dropout, dropout > 0)
    return probabilities @ v
