"""The fast path: every piece of a schedule through a stock kernel that returns its log-sum-exp, and an exact merge.

`o = sum_r o_r exp(l_r - l)` with `l = log sum_r exp(l_r)` over the pieces that a query takes part in. Each pair of
query and key is computed once, nothing of the size of all scores is held, and the backward pass runs the same pieces
with the merged output and log-sum-exp, which makes each kernel's gradients those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rope_scaling.attention.plan import Plan, Segment, turn
from rope_scaling.attention.schedule import Piece, Schedule, make_schedule
from rope_scaling.spans import Span


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_FEW = 16
"""Queries of a call that are few enough for reading the keys to be what takes the time, as in decoding."""

TurnedKeys = Callable[[Segment, Span, torch.Tensor], torch.Tensor]
"""Gives a segment's keys at the angles of a span, of at least as many keys as the span reaches."""


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    *,
    sinks: torch.Tensor | None = None,
    turned_keys: TurnedKeys | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, in tiles, with memory linear in the length.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`, on a CPU; float32, float64, bfloat16 or float16.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`; keys are not copied for the groups.
        value (`torch.Tensor`): `[B, Hk, S, d]`.
        plan (`Plan`): Spans, positions and turns.
        scaling (`float`): Multiplier of scores.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.
        turned_keys (callable, *optional*): Where turned keys come from, if they are kept between calls.

    Returns:
        `torch.Tensor`: `[B, H, T, d]`; rows that belong to no segment are 0.
    """
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, sinks)
    )
    if needs_gradients:
        return _Tiled.apply(query, key, value, sinks, plan, scaling)
    return _run(query, key, value, sinks, plan, scaling, turned_keys)[0]


def schedule_of(plan: Plan, segment: Segment) -> Schedule:
    """The kernel calls of a segment, made once for all layers that share the plan."""
    key = ("schedule", id(segment))
    if key not in plan.memo:
        plan.memo[key] = make_schedule(segment, plan.spans)
    return plan.memo[key]


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    scaling: float,
    turned_keys: TurnedKeys | None = None,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output, and the log-sum-exp of every row (`[B, H, T]`, `-inf` for rows that see nothing) if it is wanted."""
    covered = sum(len(range(query.shape[0])[s.rows]) * len(s.positions) for s in plan.segments)
    rows, heads, length, width = query.shape
    make = query.new_empty if covered == rows * length else query.new_zeros
    # In memory token by token, which is how the kernels write and how the model's next layer reads.
    out = make(rows, length, heads, width).transpose(1, 2)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=_wide(query)) if keep_lse else None
    for segment in plan.segments:
        inputs = _Inputs(query, key, value, plan, segment, turned_keys)
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


class _Inputs:
    """A segment's tensors, turned for each span once."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        segment: Segment,
        turned_keys: TurnedKeys | None = None,
    ):
        self.plan, self.segment = plan, segment
        self.query = query[segment.rows, :, segment.queries]
        self.key = key[segment.rows, :, segment.keys]
        self.value = value[segment.rows, :, segment.keys]
        self.gain = plan.query_gain(segment)
        self.turned_keys = turned_keys
        self._keys: dict[int, torch.Tensor] = {}
        self._queries: dict[tuple[int, int], torch.Tensor] = {}
        self._tile = (-1, -1)

    def keys(self, index: int) -> torch.Tensor:
        """Keys at the angles of span `index`, `[rows, Hk, S, d]`."""
        span = self.plan.spans[index]
        if span.key is None:
            return self.key
        if id(span.key) not in self._keys:
            if self.turned_keys is not None:
                self._keys[id(span.key)] = self.turned_keys(self.segment, span, self.key)
            elif span.after is not None and id(span.after.key) in self._keys:
                rotation = self.plan.step(self.segment, span.after, span, of_query=False)
                self._keys[id(span.key)] = turn(self._keys[id(span.after.key)], rotation, self.plan.layout)
            else:
                rotation = self.plan.key_rotation(self.segment, span)
                self._keys[id(span.key)] = turn(self.key, rotation, self.plan.layout)
        return self._keys[id(span.key)]

    def forget(self, begin: int) -> None:
        """Lets go of turned keys that no tile after the one at `begin` needs."""
        later = (pieces for first, _, pieces in schedule_of(self.plan, self.segment).tiles if first > begin)
        needed = {id(self.plan.spans[piece.span].key) for pieces in later for piece in pieces}
        self._keys = {name: keys for name, keys in self._keys.items() if name in needed}

    def queries(self, index: int, begin: int, end: int) -> torch.Tensor:
        """Queries `begin .. end - 1` (a tile) at the angles of span `index`, `[rows, H, end - begin, d]`."""
        if self._tile != (begin, end):
            self._tile, self._queries = (begin, end), {}
        span = self.plan.spans[index]
        name = id(span.query), id(span.amplitude)
        before = span.after and (id(span.after.query), id(span.after.amplitude))
        if name not in self._queries and span.after is not None and before in self._queries:
            rotation = self.plan.step(self.segment, span.after, span, of_query=True)
            part = rotation.part(begin, end) if rotation else None
            self._queries[name] = turn(self._queries[before], part, self.plan.layout)
        elif name not in self._queries:
            turned = self.query[:, :, begin:end]
            rotation = self.plan.query_rotation(self.segment, span)
            turned = turn(turned, rotation.part(begin, end) if rotation else None, self.plan.layout)
            if self.gain is not None:
                turned = (turned * self.gain[begin:end, None].to(turned.device)).to(turned.dtype)
            self._queries[name] = turned
        return self._queries[name]


def _tile(
    inputs: _Inputs, begin: int, end: int, pieces: list[Piece], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (float32 or wider, unless one kernel gave all of it) and log-sum-exp of a tile of queries."""
    out = lse = None
    for piece in pieces:
        q = inputs.queries(piece.span, begin, end)
        if out is not None and lse is not None and piece.shape == "full" and piece.last - piece.first <= _FEW:
            out = out.to(_wide(out))
            _add_few(inputs, piece, q, begin, scaling, out, lse)
            continue
        its_out, its_lse = _call(inputs, piece, q, begin, scaling)
        low, high = piece.begin - begin, piece.end - begin
        if lse is None and (low, high) == (0, end - begin):
            out, lse = its_out, its_lse
            continue
        if out is None:
            out = its_out.new_zeros(*its_out.shape[:2], end - begin, its_out.shape[3])
            lse = its_lse.new_full(out.shape[:3], -torch.inf)
        out = out.to(_wide(out))
        before = lse[:, :, low:high]  # type: ignore[index]
        # The share of the new piece, exp(l) / (exp(l) + exp(l before)); where there was nothing before it is 1.
        share = torch.sigmoid(its_lse - before)
        part = out[:, :, low:high]
        part.lerp_(its_out.to(part.dtype), share[..., None])
        before.copy_(torch.logaddexp(before, its_lse))
    if out is None or lse is None:
        shape = (*inputs.query.shape[:2], end - begin)
        return inputs.query.new_zeros(*shape, inputs.value.shape[3]), inputs.query.new_full(
            shape, -torch.inf, dtype=_wide(inputs.query)
        )
    return out, lse


def _add_few(
    inputs: _Inputs,
    piece: Piece,
    q: torch.Tensor,
    begin: int,
    scaling: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merges a piece of a few keys, such as sinks, into a tile's output and log-sum-exp without a kernel."""
    low, high = piece.begin - begin, piece.end - begin
    k = inputs.keys(piece.span)[:, :, piece.first : piece.last]
    v = inputs.value[:, :, piece.first : piece.last]
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (k, v))
    scores = (q[:, :, low:high].to(out.dtype) @ k.to(out.dtype).transpose(-1, -2)).mul_(scaling)  # [rows, H, n, few]
    before = lse[:, :, low:high]
    whole = torch.logaddexp(before, scores.logsumexp(-1))
    part = out[:, :, low:high].mul_(torch.exp(before - whole)[..., None])
    part += torch.exp(scores - whole[..., None]) @ v.to(out.dtype)
    before.copy_(whole)


def _call(
    inputs: _Inputs, piece: Piece, q: torch.Tensor, begin: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a piece: one kernel call, or for a band one for each row of the batch."""
    q = q[:, :, piece.begin - begin : piece.end - begin]
    k = inputs.keys(piece.span)[:, :, piece.first : piece.last]
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
        out, lse = _forward(packed, k, v, 0.0, False, scale=scaling)
        return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2), lse.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return _forward(q, k, v, 0.0, piece.shape == "causal", scale=scaling)


def _band(
    inputs: _Inputs, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All cuts of a band of one row: cuts are the kernel's batch, and their keys are overlapping views."""
    size = min(piece.cut, piece.end - piece.begin)
    count = (piece.end - piece.begin) // size
    width = piece.last - piece.first - (count - 1) * size
    cuts = q.unflatten(1, (count, size)).transpose(0, 1)
    k, v = (
        x.as_strided((count, len(x), width, x.shape[2]), (size * x.stride(1), x.stride(0), x.stride(1), 1))
        for x in (k, v)
    )
    out, lse = _forward(cuts, k, v, 0.0, False, attn_mask=_band_mask(inputs, size, width, q), scale=scaling)
    # Cut after cut and token by token in memory, so this is a view.
    return out.transpose(1, 2).flatten(0, 1).transpose(0, 1), lse.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _band_mask(inputs: _Inputs, size: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Query `i` of a cut sees the keys from `i` on, all but `size - 1` of them; additive, `[1, 1, size, width]`."""
    key = ("mask", size, width, like.dtype)
    if key not in inputs.plan.memo:
        ahead = torch.arange(width) - torch.arange(size)[:, None]
        mask = torch.where((ahead >= 0) & (ahead <= width - size), 0.0, -torch.inf)
        inputs.plan.memo[key] = mask.to(like.dtype)[None, None]
    return inputs.plan.memo[key]


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
        found = [torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in (query, key, value)]
        for segment in ctx.plan.segments:
            _segment_backward(_Inputs(query, key, value, ctx.plan, segment), grad, out, lse, ctx.scaling, found)
        of_query, of_key, of_value = (
            gradient.to(tensor.dtype) for gradient, tensor in zip(found, (query, key, value), strict=True)
        )
        of_sinks = None
        if sinks is not None:
            # The sink's value is 0, so its score only takes probability away.
            taken = torch.exp(sinks.to(lse)[None, :, None] - lse) * (grad.to(lse) * out.to(lse)).sum(-1)
            of_sinks = -taken.sum((0, 2)).to(sinks.dtype)
        return of_query, of_key, of_value, of_sinks, None, None


def _segment_backward(
    inputs: _Inputs,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    found: list[torch.Tensor],
) -> None:
    """Adds a segment's gradients to those of query, key and value."""
    plan, segment = inputs.plan, inputs.segment
    of_query, of_key, of_value = (
        gradient[segment.rows, :, where]
        for gradient, where in zip(found, (segment.queries, segment.keys, segment.keys), strict=True)
    )
    grad, out, lse = (tensor[segment.rows, :, segment.queries] for tensor in (grad, out, lse))
    turned_keys: dict[int, tuple[Span, torch.Tensor]] = {}
    for begin, end, pieces in schedule_of(plan, segment).tiles:
        turned_queries: dict[int, torch.Tensor] = {}
        for piece in pieces:
            of_q, of_k, of_v = _call_backward(inputs, piece, begin, end, grad, out, lse, scaling)
            into = turned_queries.setdefault(
                piece.span, of_query.new_zeros(*of_query.shape[:2], end - begin, grad.shape[3])
            )
            into[:, :, piece.begin - begin : piece.end - begin] += of_q
            span = plan.spans[piece.span]
            # Spans that share the turn of their keys share its gradient too.
            keys = (
                of_key
                if span.key is None
                else turned_keys.setdefault(
                    id(span.key), (span, torch.zeros_like(of_key, memory_format=torch.contiguous_format))
                )[1]
            )
            keys[:, :, piece.first : piece.last] += of_k
            of_value[:, :, piece.first : piece.last] += of_v
        for index, gradient in turned_queries.items():
            rotation = plan.query_rotation(segment, plan.spans[index])
            if inputs.gain is not None:
                gradient = gradient * inputs.gain[begin:end, None].to(gradient)
            back = rotation.part(begin, end).adjoint() if rotation else None
            of_query[:, :, begin:end] += turn(gradient, back, plan.layout)
    for span, gradient in turned_keys.values():
        rotation = plan.key_rotation(segment, span)
        of_key += turn(gradient, rotation.adjoint() if rotation else None, plan.layout)


def _call_backward(
    inputs: _Inputs,
    piece: Piece,
    begin: int,
    end: int,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a piece's queries, keys (both as turned) and values."""
    q = inputs.queries(piece.span, begin, end)[:, :, piece.begin - begin : piece.end - begin]
    k = inputs.keys(piece.span)[:, :, piece.first : piece.last]
    v = inputs.value[:, :, piece.first : piece.last]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    grad, out, lse = (tensor[:, :, piece.begin : piece.end] for tensor in (grad, out, lse))
    if piece.shape == "band":
        of_q, of_k, of_v = _band_backward(inputs, piece, grad, q, k, v, out, lse, scaling)
    elif piece.shape == "reversed":
        flipped = (tensor.flip(2) for tensor in (grad, q, k, v, out, lse))
        of_q, of_k, of_v = (part.flip(2) for part in _backward(*flipped, 0.0, True, scale=scaling))
    else:
        of_q, of_k, of_v = _backward(grad, q, k, v, out, lse, 0.0, piece.shape == "causal", scale=scaling)
    if groups > 1:
        of_k, of_v = (part.unflatten(1, (-1, groups)).sum(2) for part in (of_k, of_v))
    return of_q, of_k, of_v


def _band_backward(
    inputs: _Inputs,
    piece: Piece,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = min(piece.cut, piece.end - piece.begin)
    width = piece.last - piece.first - (piece.end - piece.begin - size)
    mask = _band_mask(inputs, size, width, q)
    of_q, of_k, of_v = (torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in (q, k, v))
    for cut in range(0, piece.end - piece.begin, size):
        rows, keys = slice(cut, cut + size), slice(cut, cut + width)
        parts = _backward(
            *(grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows]),
            *(0.0, False),
            attn_mask=mask,
            scale=scaling,
        )
        for into, where, part in zip((of_q, of_k, of_v), (rows, keys, keys), parts, strict=True):
            into[:, :, where] += part
    return of_q, of_k, of_v


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
