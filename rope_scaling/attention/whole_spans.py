"""Attention from spans on a GPU: whole spans through PyTorch's own kernels, and an exact merge.

Queries and keys are rotated once for each span, a span is one kernel call or a few (`blocks.py`), and the parts of
the softmax are merged by their log-sum-exps. Nothing of the size of all scores is held, nothing is compiled for a
length, and the backward pass runs the same blocks with the merged output and log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from rope_scaling.attention.blocks import Block, make_blocks
from rope_scaling.attention.fused import add_rotated_, merge_, reverse_tokens, rotate
from rope_scaling.attention.kernels import Kernels
from rope_scaling.attention.plan import Plan, RotatedKeySource
from rope_scaling.attention.rotation import Rotation
from rope_scaling.attention.sequences import Segment
from rope_scaling.spans import Span


def whole_span_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float,
    kernels: Kernels,
    *,
    sinks: torch.Tensor | None = None,
    rotated_keys: RotatedKeySource | None = None,
) -> torch.Tensor:
    """Attention as the spans define it, with memory linear in the length.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, S, d]`, `H` a multiple of `Hk`.
        value (`torch.Tensor`): `[B, Hk, S, d]`.
        plan (`Plan`): Spans, positions and rotations.
        scaling (`float`): Multiplier of scores.
        kernels (`Kernels`): What computes the blocks.
        sinks (`torch.Tensor`, *optional*): A learned score for every head that takes part in the softmax, `[H]`.
        rotated_keys (callable, *optional*): Where rotated keys come from, if they are kept between calls.

    Returns:
        `torch.Tensor`: `[B, H, T, d]`; rows that belong to no segment are 0.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    needs_gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, sinks)
    )
    if needs_gradients:
        return _WholeSpans.apply(query, key, value, sinks, plan, scaling, kernels)
    return _run(query, key, value, sinks, plan, scaling, kernels, rotated_keys)[0]


@dataclass(frozen=True, eq=False)
class SpanTask:
    """The blocks of one span of a segment, and what they need that is the same in every layer."""

    plan: Plan
    segment: Segment
    span: Span
    calls: list[tuple[slice, slice, Block]]
    """Rows of the batch, the same counted from the segment's first, and block of every kernel call: all rows at once,
    or the blocks of one row as a batch."""
    begin: int
    """First query of the blocks, in the segment."""
    first: int
    """First key."""
    last: int
    """Last key + 1."""
    queries: slice
    """The queries of the blocks, of the call."""
    query_rotation: Rotation | None
    gain: torch.Tensor | None
    """What every query is multiplied with, float32."""

    @cached_property
    def key_rotation(self) -> Rotation | None:
        """Of the keys `first .. last - 1`."""
        rotation = self.plan.key_rotation(self.segment, self.span) if self.span.key is not None else None
        return rotation.part(self.first, self.last) if rotation else None


def tasks_of(plan: Plan, kernels: Kernels) -> list[SpanTask]:
    """The kernel calls of a plan, made once for all layers that share it."""
    key = ("tasks", kernels)
    if key not in plan.memo:
        plan.memo[key] = [
            _task(plan, segment, plan.spans[index], list(blocks))
            for segment in plan.segments
            for index, blocks in groupby(
                make_blocks(segment, plan.spans, kernels.native_band), key=lambda block: block.span
            )
        ]
    return plan.memo[key]  # type: ignore[no-any-return]


def _task(plan: Plan, segment: Segment, span: Span, blocks: list[Block]) -> SpanTask:
    begin, end = min(block.begin for block in blocks), max(block.end for block in blocks)
    rotation, gain = plan.query_rotation(segment, span), plan.query_gain(segment)
    rows, start = segment.rows, segment.queries.start
    calls: list[tuple[slice, slice, Block]] = []
    for block in blocks:
        each = [rows] if block.count == 1 else [slice(row, row + 1) for row in range(rows.start, rows.stop)]
        calls.extend((at, slice(at.start - rows.start, at.stop - rows.start), block) for at in each)
    return SpanTask(
        plan=plan,
        segment=segment,
        span=span,
        calls=calls,
        begin=begin,
        first=min(block.first for block in blocks),
        last=max(block.key_end for block in blocks),
        queries=slice(start + begin, start + end),
        query_rotation=rotation.part(begin, end) if rotation else None,
        gain=None if gain is None else gain[begin:end].to(plan.device, torch.float32),
    )


_HEADS_AT_ONCE = 2**29
"""Bytes of queries whose heads are computed together; rotated queries and partial outputs are as large."""


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    scaling: float,
    kernels: Kernels,
    rotated_keys: RotatedKeySource | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the log-sum-exp of every query (`[B, H, T]`, float32, `-inf` for those that see nothing)."""
    result = _Result(query)
    groups = _head_groups(query, key) if rotated_keys is None else [(slice(None), slice(None))]
    for heads, key_heads in groups:
        tensors = query[:, heads], key[:, key_heads], value[:, key_heads]
        part = result if len(groups) == 1 else result.of_heads(heads)
        for task in tasks_of(plan, kernels):
            _run_span(task, _Rotated(task, *tensors, rotated_keys), part, scaling, kernels)
    out, lse = result.get()
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse)[None, :, None])
        out = (out * torch.exp(lse - whole)[..., None]).to(out.dtype)
        lse = whole
    return out, lse


def _head_groups(query: torch.Tensor, key: torch.Tensor) -> list[tuple[slice, slice]]:
    """Heads and key heads to compute at a time."""
    heads, key_heads = query.shape[1], key.shape[1]
    size = query.numel() * query.element_size()
    count = next(
        n for n in range(1, key_heads + 1) if key_heads % n == 0 and (size <= n * _HEADS_AT_ONCE or n == key_heads)
    )
    steps = heads // count, key_heads // count
    return [tuple(slice(index * step, (index + 1) * step) for step in steps) for index in range(count)]  # type: ignore[misc]


class _Result:
    """Output and log-sum-exp of a call while its blocks come in."""

    def __init__(self, query: torch.Tensor, out: torch.Tensor | None = None, lse: torch.Tensor | None = None):
        self.query, self.out, self.lse = query, out, lse

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, with 0 and `-inf` where nothing came in."""
        if self.out is None or self.lse is None:
            rows, heads, length, width = self.query.shape
            # Token by token in memory, as the kernels write and as the model's next layer reads.
            self.out = self.query.new_zeros(rows, length, heads, width).transpose(1, 2)
            self.lse = self.query.new_full((rows, heads, length), -torch.inf, dtype=torch.float32)
        return self.out, self.lse

    def of_heads(self, heads: slice) -> _Result:
        """The part of some heads, as views."""
        out, lse = self.get()
        return _Result(self.query[:, heads], out[:, heads], lse[:, heads])

    def add(
        self,
        where: tuple[slice, int, int, int, int],
        new: torch.Tensor,
        new_lse: torch.Tensor,
        block: Block,
        is_reversed: bool,
    ) -> None:
        """Takes in the result of a block."""
        if self.out is None and not is_reversed:
            # A call that has all queries is where the others are merged into.
            if new.shape == self.query.shape:
                self.out, self.lse = new, new_lse
                return
            in_order = where[0] == slice(0, 1) and where[1] == 0 and block.query_step == block.queries
            if in_order and len(self.query) == 1 and block.count * block.queries == self.query.shape[2]:
                self.out = new.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
                self.lse = new_lse.transpose(0, 1).flatten(1, 2)[None]
                return
        out, lse = (_blocks(x, *where) for x in self.get())
        if block.is_first and not is_reversed:
            out.copy_(new)
            lse.copy_(new_lse)
        else:
            merge_(out, lse, new, new_lse, is_reversed=is_reversed)


def _run_span(task: SpanTask, tensors: _Rotated, result: _Result, scaling: float, kernels: Kernels) -> None:
    """Runs the blocks of one span of a segment."""
    start = task.segment.queries.start
    for rows, inside, block in task.calls:
        kernel = kernels.of(block.shape, block.queries)
        (q, k, v), shape = tensors.inputs(inside, block), block.shape
        is_reversed = shape not in kernel.shapes
        if is_reversed:
            q, k, v = (reverse_tokens(x) for x in (q, k, v))
            shape = "causal"
        new, new_lse = kernel.forward(q, k, v, shape, scaling)
        where = rows, start + block.begin, block.queries, block.query_step, block.count
        result.add(where, new, new_lse, block, is_reversed)
        del q, k, v, new


def _blocks(x: torch.Tensor, rows: slice, first: int, size: int, step: int, count: int) -> torch.Tensor:
    """`count` pieces of `size` tokens, `step` apart, of rows of `x` (`[B, H, T, ...]`), as a batch and a view."""
    if rows.stop - rows.start != len(x):
        x = x[rows]
    if count == 1:
        return x if size == x.shape[2] else x.narrow(2, first, size)
    stride = x.stride()
    shape = (count, x.shape[1], size, *x.shape[3:])
    offset = x.storage_offset() + first * stride[2]
    return x.as_strided(shape, (step * stride[2], *stride[1:]), offset)


class _Rotated:
    """The tensors of one layer for a task: the queries and keys that its blocks need, rotated."""

    def __init__(
        self,
        task: SpanTask,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotated_keys: RotatedKeySource | None = None,
    ):
        self.task = task
        segment, layout = task.segment, task.plan.layout
        self.query = rotate(query[segment.rows, :, task.queries], task.query_rotation, layout, task.gain)
        self.value = value[segment.rows, :, segment.keys]
        self.key, self.key_start = key[segment.rows, :, segment.keys], 0
        if task.span.key is not None and rotated_keys is not None:
            self.key, self.key_start = rotated_keys(segment, task.span, self.key)
        elif task.span.key is not None:
            self.key = rotate(self.key[:, :, task.first : task.last], task.key_rotation, layout)
            self.key_start = task.first

    def inputs(self, rows: slice, block: Block) -> list[torch.Tensor]:
        """Queries, keys and values of a call, for rows counted from the segment's first."""
        of_keys = block.keys, block.key_step, block.count
        return [
            _blocks(self.query, rows, block.begin - self.task.begin, block.queries, block.query_step, block.count),
            _blocks(self.key, rows, block.first - self.key_start, *of_keys),
            _blocks(self.value, rows, block.first, *of_keys),
        ]


class _WholeSpans(torch.autograd.Function):
    """Gradients block by block: with the merged output and log-sum-exp every kernel's backward is exact."""

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, sinks: Any, plan: Plan, scaling: float, kernels: Kernels
    ) -> torch.Tensor:
        out, lse = _run(query, key, value, sinks, plan, scaling, kernels)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.plan, ctx.scaling, ctx.kernels = plan, scaling, kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value)]
        for task in tasks_of(ctx.plan, ctx.kernels):
            tensors = _Rotated(task, query, key, value)
            _span_backward(task, tensors, grad, out, lse, ctx.scaling, ctx.kernels, totals)
            del tensors  # before the next is made
        gradients = [total.to(tensor.dtype) for total, tensor in zip(totals, (query, key, value), strict=True)]
        of_sinks = None
        if sinks is not None:
            # The sink's value is 0, so its score only takes probability away.
            taken = torch.exp(sinks.to(lse)[None, :, None] - lse) * (grad.float() * out.float()).sum(-1)
            of_sinks = -taken.sum((0, 2)).to(sinks.dtype)
        return *gradients, of_sinks, None, None, None


def _span_backward(
    task: SpanTask,
    tensors: _Rotated,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
    kernels: Kernels,
    totals: list[torch.Tensor],
) -> None:
    """Adds the gradients of one span of a segment to those of query, key and value."""
    segment, layout = task.segment, task.plan.layout
    of_query = totals[0]
    of_key, of_value = (total[segment.rows, :, segment.keys] for total in totals[1:])
    back = task.query_rotation.adjoint() if task.query_rotation else None
    key_back = task.key_rotation.adjoint() if task.key_rotation else None
    for rows, inside, block in task.calls:
        where = rows, segment.queries.start + block.begin, block.queries, block.query_step, block.count
        kernel = kernels.of(block.shape, block.queries)
        its_grad, its_out, its_lse = (_blocks(x, *where) for x in (grad, out, lse))
        q, k, v = tensors.inputs(inside, block)
        shape, is_reversed = block.shape, block.shape not in kernel.shapes
        if is_reversed:
            its_grad, its_out, q, k, v = (reverse_tokens(x) for x in (its_grad, its_out, q, k, v))
            its_lse, shape = its_lse.flip(2), "causal"
        of_q, of_k, of_v = kernel.backward(its_grad, q, k, v, its_out, its_lse, shape, scaling)
        of_keys = inside, block.first, block.keys, block.key_step, block.count
        first, key_first = block.begin - task.begin, block.first - task.first
        rotation_part = back.part(first, first + block.end - block.begin) if back else None
        gain = None if task.gain is None else task.gain[first:]
        more: dict[str, Any] = {"step": block.query_step, "is_reversed": is_reversed}
        add_rotated_(_blocks(of_query, *where), of_q, rotation_part, layout, gain, **more)
        rotation_part = key_back.part(key_first, key_first + block.key_end - block.first) if key_back else None
        more["step"] = block.key_step
        add_rotated_(_blocks(of_key, *of_keys), of_k, rotation_part, layout, **more)
        add_rotated_(_blocks(of_value, *of_keys), of_v, None, layout, **more)
