"""Reference implementation: dense attention computed directly from the definition of spans.

Slow, in any precision, and used for nothing else: every engine is tested against it.
"""

from __future__ import annotations

import torch

from rope_scaling.attention.plan import Plan, apply_rotation


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, through a matrix of all scores.

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
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    for segment in plan.segments:
        q = query[segment.rows, :, segment.queries]
        k, v = (x[segment.rows, :, segment.keys].repeat_interleave(groups, 1) for x in (key, value))
        gain = plan.query_gain(segment)
        if gain is not None:
            q = q * gain[:, None].to(q)
        scores = torch.full((*q.shape[:3], k.shape[2]), -torch.inf, dtype=wide, device=q.device)
        index = torch.arange(k.shape[2])
        for span in plan.spans:
            first, last = segment.bounds(span)
            seen = (index >= first[:, None]) & (index <= last[:, None])
            rotated = apply_rotation(q, plan.query_rotation(segment, span), plan.layout)
            keys = apply_rotation(k, plan.key_rotation(segment, span), plan.layout)
            span_scores = (rotated @ keys.transpose(-1, -2)).to(wide) * scaling
            if softcap is not None:
                span_scores = softcap * torch.tanh(span_scores / softcap)
            scores = torch.where(seen.to(q.device), span_scores, scores)
        if sinks is not None:
            column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
        probabilities = torch.softmax(scores.masked_fill(sees_nothing, 0), dim=-1).masked_fill(sees_nothing, 0)
        out[segment.rows, :, segment.queries] = probabilities[..., : k.shape[2]].to(v.dtype) @ v
    return out
