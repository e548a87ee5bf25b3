"""The backward pass of the tiled engine: the same pieces, with the merged output and log-sum-exp.

A kernel's gradients depend on the whole row only through its output and log-sum-exp. Given those of the merged row,
each kernel's backward pass gives its piece's part of the gradients of the whole.
"""

from __future__ import annotations

import torch

from rope_scaling.attention.plan import apply_rotation
from rope_scaling.attention.rotated_inputs import Inputs, band_mask, schedule_of, wide
from rope_scaling.attention.tiling import Piece
from rope_scaling.spans import Span


_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def segment_backward(
    inputs: Inputs,
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
    rotated_keys: dict[int, tuple[Span, torch.Tensor]] = {}
    for begin, end, pieces in schedule_of(plan, segment).tiles:
        rotated_queries: dict[int, torch.Tensor] = {}
        for piece in pieces:
            of_q, of_k, of_v = _call_backward(inputs, piece, begin, end, grad, out, lse, scaling)
            into = rotated_queries.setdefault(
                piece.span, of_query.new_zeros(*of_query.shape[:2], end - begin, grad.shape[3])
            )
            into[:, :, piece.begin - begin : piece.end - begin] += of_q
            span = plan.spans[piece.span]
            # Spans that share the rotation of their keys share its gradient too.
            keys = (
                of_key
                if span.key is None
                else rotated_keys.setdefault(
                    id(span.key), (span, torch.zeros_like(of_key, memory_format=torch.contiguous_format))
                )[1]
            )
            keys[:, :, piece.first : piece.last] += of_k
            of_value[:, :, piece.first : piece.last] += of_v
        inputs.forget(begin)
        for index, gradient in rotated_queries.items():
            rotation = plan.query_rotation(segment, plan.spans[index])
            if inputs.gain is not None:
                gradient = gradient * inputs.gain[begin:end, None].to(gradient)
            back = rotation.part(begin, end).adjoint() if rotation else None
            of_query[:, :, begin:end] += apply_rotation(gradient, back, plan.layout)
    for span, gradient in rotated_keys.values():
        rotation = plan.key_rotation(segment, span)
        of_key += apply_rotation(gradient, rotation.adjoint() if rotation else None, plan.layout)


def _call_backward(
    inputs: Inputs,
    piece: Piece,
    begin: int,
    end: int,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a piece's queries, keys (both as rotated) and values."""
    q = inputs.queries(piece.span, begin, end)[:, :, piece.begin - begin : piece.end - begin]
    k = inputs.keys(piece.span, piece.first, piece.last)
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
    inputs: Inputs,
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
    mask = band_mask(inputs, size, width, q)
    of_q, of_k, of_v = (torch.zeros_like(tensor, dtype=wide(tensor)) for tensor in (q, k, v))
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
