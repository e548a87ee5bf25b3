"""The fast path: every piece of a schedule through a stock kernel that returns its log-sum-exp, and an exact merge.

`o = sum_r o_r exp(l_r - l)` with `l = log sum_r exp(l_r)` over the pieces that a query takes part in. Each pair of
query and key is computed once, nothing of the size of all scores is held, and the backward pass runs the same pieces
with the merged output and log-sum-exp, which makes each kernel's gradients those of the whole.
"""

from __future__ import annotations

from typing import Any

import torch

from rope_scaling.attention.plan import Plan, RotatedKeySource
from rope_scaling.attention.rotated_inputs import Inputs, band_mask, schedule_of, wide
from rope_scaling.attention.tiled_backward import segment_backward
from rope_scaling.attention.tiling import Piece


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

_MANY = 2048
"""Keys of a call that are worth halving for it."""
_FEW = 16
"""Queries of a call that are few enough for reading the keys to be what takes the time, as in decoding."""


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    sinks: torch.Tensor | None = None,
    rotated_keys: RotatedKeySource | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, in tiles, with memory linear in the length.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`, on a CPU; float32, float64, bfloat16 or float16.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`; keys are not copied for the groups.
        value (`torch.Tensor`): `[B, Hk, S, d]`.
        plan (`Plan`): Spans, positions and rotations.
        scaling (`float`): Multiplier of scores.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.
        rotated_keys (callable, *optional*): Where rotated keys come from, if they are kept between calls.

    Returns:
        `torch.Tensor`: `[B, H, T, d]`; rows that belong to no segment are 0.
    """
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, sinks)
    )
    # The kernels read the last dimension as if it were the innermost.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if needs_gradients:
        return _Tiled.apply(query, key, value, sinks, plan, scaling)
    return _run(query, key, value, sinks, plan, scaling, rotated_keys)[0]


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    scaling: float,
    rotated_keys: RotatedKeySource | None = None,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output, and the log-sum-exp of every row (`[B, H, T]`, `-inf` for rows that see nothing) if it is wanted."""
    covered = sum(len(range(query.shape[0])[s.rows]) * len(s.positions) for s in plan.segments)
    rows, heads, length, width = query.shape
    make = query.new_empty if covered == rows * length else query.new_zeros
    # In memory token by token, which is how the kernels write and how the model's next layer reads.
    out = make(rows, length, heads, width).transpose(1, 2)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=wide(query)) if keep_lse else None
    for segment in plan.segments:
        inputs = Inputs(query, key, value, plan, segment, rotated_keys)
        for begin, end, pieces in schedule_of(plan, segment).tiles:
            tile_out, tile_lse = _tile(inputs, begin, end, pieces, scaling)
            if sinks is not None:
                column = sinks.to(tile_lse)[None, :, None]
                whole = torch.logaddexp(tile_lse, column)
                tile_out = tile_out * torch.exp(tile_lse - whole)[..., None]
                tile_lse = whole
            inputs.forget(begin)
            where = slice(segment.queries.start + begin, segment.queries.start + end)
            out[segment.rows, :, where] = tile_out.to(out.dtype)
            if lse is not None:
                lse[segment.rows, :, where] = tile_lse
    return out, lse


def _tile(
    inputs: Inputs, begin: int, end: int, pieces: list[Piece], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (float32 or wider, unless one kernel gave all of it) and log-sum-exp of a tile of queries."""
    out = lse = None
    for piece in pieces:
        q = inputs.queries(piece.span, begin, end)
        its_out, its_lse = _call(inputs, piece, q, begin, scaling)
        low, high = piece.begin - begin, piece.end - begin
        if lse is None and (low, high) == (0, end - begin):
            out, lse = its_out, its_lse
            continue
        if out is None:
            out = its_out.new_zeros(*its_out.shape[:2], end - begin, its_out.shape[3])
            lse = its_lse.new_full(out.shape[:3], -torch.inf)
        out = out.to(wide(out))
        before = lse[:, :, low:high]  # type: ignore[index]
        # The share of the new piece, exp(l) / (exp(l) + exp(l before)); where there was nothing before it is 1.
        share = torch.sigmoid(its_lse - before)
        part = out[:, :, low:high]
        # Many queries head by head: that stays in the processor's cache, and needs no copy of all.
        size = part.shape[1] if high - low <= _FEW else 1
        for into, its, its_share in zip(*(x.split(size, 1) for x in (part, its_out, share)), strict=True):
            into.lerp_(its.to(part.dtype), its_share[..., None])
        before.copy_(torch.logaddexp(before, its_lse))
    if out is None or lse is None:
        shape = (*inputs.query.shape[:2], end - begin)
        return inputs.query.new_zeros(*shape, inputs.value.shape[3]), inputs.query.new_full(
            shape, -torch.inf, dtype=wide(inputs.query)
        )
    return out, lse


def _call(
    inputs: Inputs, piece: Piece, q: torch.Tensor, begin: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a piece: one kernel call, or for a band one for each row of the batch."""
    q = q[:, :, piece.begin - begin : piece.end - begin]
    k = inputs.keys(piece.span, piece.first, piece.last)
    v = inputs.value[:, :, piece.first : piece.last]
    if piece.shape == "band":
        results = [_band(inputs, piece, q[row], k[row], v[row], scaling) for row in range(len(q))]
        return tuple(torch.stack(parts) if len(q) > 1 else parts[0][None] for parts in zip(*results, strict=True))  # type: ignore[return-value]
    if piece.shape == "reversed":
        out, lse = _forward(q.flip(2), k.flip(2), v.flip(2), 0.0, True, scale=scaling)
        return out.flip(2), lse.flip(2)
    if piece.shape == "full" and q.shape[2] <= _FEW:
        # The heads of a group as rows of one, or the kernel would read the keys once for each of them.
        packed = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [rows, Hk, groups * n, d]
        out, lse = _in_halves(packed, k, v, scaling)
        return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2), lse.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return _forward(q, k, v, 0.0, piece.shape == "causal", scale=scaling)


def _in_halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Few queries against many keys: the halves of the keys as a batch of two, for every core to have work."""
    count = k.shape[2]
    if len(q) > 1 or count < _MANY or count % 2:
        return _forward(q, k, v, 0.0, False, scale=scaling)
    halves = (x[0].unflatten(1, (2, count // 2)).transpose(0, 1) for x in (k, v))
    out, lse = _forward(q.expand(2, -1, -1, -1), *halves, 0.0, False, scale=scaling)
    share = torch.sigmoid(lse[1] - lse[0])[None, ..., None]
    out = out.to(wide(out))
    return torch.lerp(out[:1], out[1:], share), torch.logaddexp(lse[:1], lse[1:])


def _band(
    inputs: Inputs, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All cuts of a band of one row: cuts are the kernel's batch, and their keys are overlapping views."""
    size = min(piece.cut, piece.end - piece.begin)
    count = (piece.end - piece.begin) // size
    width = piece.last - piece.first - (count - 1) * size
    cuts = q.unflatten(1, (count, size)).transpose(0, 1)
    k, v = (
        x.as_strided((count, len(x), width, x.shape[2]), (size * x.stride(1), x.stride(0), x.stride(1), x.stride(2)))
        for x in (k, v)
    )
    out, lse = _forward(cuts, k, v, 0.0, False, attn_mask=band_mask(inputs, size, width, q), scale=scaling)
    # Cut after cut and token by token in memory, so this is a view.
    return out.transpose(1, 2).flatten(0, 1).transpose(0, 1), lse.transpose(1, 2).flatten(0, 1).transpose(0, 1)


class _Tiled(torch.autograd.Function):
    """Gradients piece by piece: with the merged output and log-sum-exp every kernel's backward is exact."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, sinks: Any, plan: Plan, scaling: float) -> torch.Tensor:
        out, lse = _run(query, key, value, sinks, plan, scaling, keep_lse=True)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        found = [torch.zeros_like(tensor, dtype=wide(tensor)) for tensor in (query, key, value)]
        for segment in ctx.plan.segments:
            segment_backward(Inputs(query, key, value, ctx.plan, segment), grad, out, lse, ctx.scaling, found)
        of_query, of_key, of_value = (
            gradient.to(tensor.dtype) for gradient, tensor in zip(found, (query, key, value), strict=True)
        )
        of_sinks = None
        if sinks is not None:
            # The sink's value is 0, so its score only takes probability away.
            taken = torch.exp(sinks.to(lse)[None, :, None] - lse) * (grad.to(lse) * out.to(lse)).sum(-1)
            of_sinks = -taken.sum((0, 2)).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None
