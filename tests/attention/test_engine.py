"""The tiled engine against the reference implementation, outputs and gradients; and that against loops."""

import math
from dataclasses import replace

import pytest
import torch
from engine_cases import (
    GEOMETRY,
    INV_FREQ,
    L0,
    LAYOUTS,
    METHODS,
    ROPE,
    WIDTH,
    by_model,
    intervals,
    plan,
    tensors,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from rope_scaling import (
    LogN,
    SlidingWindow,
    Span,
    relative_positions,
)
from rope_scaling.attention.blockwise import blockwise_attention
from rope_scaling.attention.flex import block_mask, flex_span_attention
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.reference import reference_attention
from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.tiled import tiled_attention
from rope_scaling.attention.tiling import make_schedule
from rope_scaling.spans import compose


@pytest.mark.parametrize("layout", LAYOUTS, ids=["halves", "neighbours", "last"])
@pytest.mark.parametrize("name", METHODS)
def test_the_law_is_the_definition(name, layout):
    """Scores from relative angles, pair by pair, for vectors that nothing has rotated."""
    length, method = 150, METHODS[name]
    q, k, v = tensors(length, rows=1)
    angles = relative_positions(method, length, geometry=GEOMETRY, angles=True)
    seen = ~torch.isnan(angles).all(-1) if name == "waveprune" else ~torch.isnan(angles[..., 0])
    amplitude = torch.ones(length, length, WIDTH // 2, dtype=torch.float64)
    for span in method.spans(ROPE):
        positions = torch.arange(length)
        inside = (positions >= span.first(positions)[:, None]) & (positions <= span.last(positions)[:, None])
        if span.amplitude is not None:
            amplitude[inside] = span.amplitude
        if name == "waveprune":
            seen |= inside
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    (q1, q2), (k1, k2) = layout.pairs(q, 0, WIDTH // 2), layout.pairs(k, 0, WIDTH // 2)
    turns = angles.nan_to_num(0)
    even = torch.einsum("bhmi,bhni,mni->bhmn", q1, k1, turns.cos() * amplitude)
    even += torch.einsum("bhmi,bhni,mni->bhmn", q2, k2, turns.cos() * amplitude)
    odd = torch.einsum("bhmi,bhni,mni->bhmn", q1, k2, turns.sin() * amplitude)
    odd -= torch.einsum("bhmi,bhni,mni->bhmn", q2, k1, turns.sin() * amplitude)
    rotated = set(range(layout.start, layout.start + WIDTH))
    still = [dimension for dimension in range(24) if dimension not in rotated]
    scores = even + odd + q[..., still] @ k[..., still].transpose(-1, -2)
    wanted = torch.softmax((scores * 0.3).masked_fill(~seen, -math.inf), -1) @ v
    (segment,) = whole(length, rows=1)
    # A model that rotates nothing: what it would have done is the span's.
    own = ROPE.positions(lambda positions: positions)
    spans = [replace(span, query=span.query or own, key=span.key or own) for span in method.spans(ROPE)]
    made = Plan(spans, [segment], layout, torch.zeros_like(INV_FREQ))
    found = reference_attention(*tensors(length, rows=1), made, 0.3)
    assert torch.allclose(found, wanted, atol=1e-6)  # frequencies are float32


@pytest.mark.parametrize(("length", "tile"), [(1, 2048), (2, 2048), (65, 2048), (301, 2048), (700, 96)])
@pytest.mark.parametrize("name", [*METHODS, "plain"])
def test_tiled_is_the_law(name, length, tile):
    q, k, v = tensors(length)
    q, k = (by_model(x, LAYOUTS[0]) for x in (q, k))
    made = plan(METHODS.get(name), whole(length), LAYOUTS[0], tile)
    found = tiled_attention(q, k, v, made, 0.3)
    assert torch.allclose(found, reference_attention(q, k, v, made, 0.3), atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_float32_gradients_are_those_of_the_law(name):
    length = 333
    q, k, v = tensors(length, dtype=torch.float32)
    sinks = torch.randn(4, requires_grad=True)
    inputs = [x.requires_grad_() for x in (by_model(q, LAYOUTS[1]), by_model(k, LAYOUTS[1]), v)]
    made = plan(METHODS[name], whole(length), LAYOUTS[1], 128, temperature=lambda m: LogN().scale(m, L0))
    weights = torch.randn(q.shape)
    one = torch.autograd.grad(tiled_attention(*inputs, made, 0.3, sinks=sinks), [*inputs, sinks], weights)
    other = torch.autograd.grad(reference_attention(*inputs, made, 0.3, sinks=sinks), [*inputs, sinks], weights)
    for found, wanted in zip(one, other, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("windows_first", [False, True])
@pytest.mark.parametrize("name", ["uniform", "waveprune", "from the model's own"])
def test_spans_rotated_one_from_another_leave_what_they_were_given(name, windows_first):
    """In place, from span to span, also where windows interrupt or repeat the row."""
    near, far = METHODS["clip"].spans(ROPE)
    of_name = METHODS[name].spans(ROPE) if name in METHODS else [near, replace(far, after=near)]
    parts = of_name, SlidingWindow(window=130, num_sinks=20).spans(ROPE)
    spans = compose(*(reversed(parts) if windows_first else parts))
    q, k, v = tensors(400, dtype=torch.float32)
    inputs = by_model(q, LAYOUTS[0]), by_model(k, LAYOUTS[0]), v
    kept = [x.clone() for x in inputs]
    made = Plan(spans, whole(400), LAYOUTS[0], INV_FREQ, tile=96)
    wanted = reference_attention(*inputs, made, 0.3)
    for _ in range(2):
        assert torch.allclose(tiled_attention(*inputs, made, 0.3), wanted, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_stock_kernel(dtype):
    length = 400
    exact = tensors(length, head_dim=32)
    q, k, v = (x.to(dtype) for x in exact)
    made = plan(None, whole(length), RotaryLayout(WIDTH), 128)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True, scale=0.3
    )
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    ours = tiled_attention(q, k, v, made, 0.3)
    assert (ours - wanted).abs().max() <= 2 * (stock - wanted).abs().max()
    clipped = plan(METHODS["rerope"], whole(length), RotaryLayout(WIDTH), 128)
    error = tiled_attention(q, k, v, clipped, 0.3) - reference_attention(*exact, clipped, 0.3)
    assert error.abs().max() < {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("name", [*METHODS, "plain"])
def test_flex_attention_is_the_law(name):
    """By FlexAttention's dense form, which needs no GPU but has no gradients: spans, bounds, rotations and merge."""
    length = 150
    q, k, v = tensors(length, rows=3, head_dim=32, dtype=torch.float32)
    positions, late = torch.arange(length), torch.arange(100)
    segments = [
        Segment(slice(0, 2), slice(0, length), slice(0, length), positions, positions),
        Segment(slice(2, 3), slice(50, length), slice(50, length), late, late, 50),
    ]
    sinks = torch.randn(4)
    more = {"temperature": lambda m: LogN().scale(m, L0)} if name == "rerope" else {}
    made = plan(METHODS.get(name), segments, LAYOUTS[0], **more)
    soft = {"softcap": 3.0, "sinks": sinks}
    found, wanted = (attend(q, k, v, made, 0.3, **soft) for attend in (flex_span_attention, reference_attention))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_offsets_of_the_caller_do_not_matter():
    """Positions that the caller counts from elsewhere rotate queries and keys differently, to the same differences."""
    q, k, v = tensors(200)
    for name in ("rerope", "string", "self_extend", "dynamic_ntk", "clip"):
        outs = []
        for offset in (0, 37):
            made = plan(METHODS[name], whole(200, offset=offset), LAYOUTS[0])
            outs.append(tiled_attention(*(by_model(x, LAYOUTS[0], offset) for x in (q, k)), v, made, 0.3))
        assert torch.allclose(*outs, atol=1e-4), name


def test_rows_apart_and_rows_outside():
    q, k, v = tensors(120, rows=3)
    positions = torch.arange(50)
    segments = [
        Segment(slice(0, 1), slice(0, 50), slice(0, 50), positions, positions),
        Segment(slice(0, 1), slice(50, 100), slice(50, 100), positions, positions),
        Segment(slice(2, 3), slice(70, 120), slice(70, 120), positions, positions),
    ]
    made = plan(METHODS["rerope"], segments, LAYOUTS[0])
    found = tiled_attention(q, k, v, made, 0.3)
    assert torch.allclose(found, reference_attention(q, k, v, made, 0.3), atol=1e-12)
    assert (found[1] == 0).all() and (found[0, :, 100:] == 0).all() and (found[2, :, :70] == 0).all()


@pytest.mark.parametrize("name", [*METHODS, "plain"])
@pytest.mark.parametrize("length", [1, 90, 300])
def test_blockwise_is_the_reference(name, length):
    q, k, v = tensors(length)
    more = {"temperature": lambda m: LogN().scale(m, L0)} if name == "rerope" else {}
    made = plan(METHODS.get(name), whole(length), LAYOUTS[1], **more)
    for options in ({"softcap": 2.0}, {"sinks": torch.randn(4, dtype=torch.float64)}, {}):
        found = blockwise_attention(q, k, v[..., :7], made, 0.3, **options)
        assert torch.allclose(found, reference_attention(q, k, v[..., :7], made, 0.3, **options), atol=1e-12)
    capped = blockwise_attention(q, k, v[..., :7], made, 0.3, softcap=2.0)
    assert length == 1 or not torch.allclose(found, capped, atol=1e-3)


def test_blockwise_gradients_and_rows_outside():
    q, k, v = (x.requires_grad_() for x in tensors(300, rows=3))
    positions = torch.arange(260)
    segments = [Segment(slice(row, row + 1), slice(0, 260), slice(0, 260), positions, positions) for row in (0, 2)]
    made, weights = plan(METHODS["rerope"], segments, LAYOUTS[0]), torch.randn(q.shape, dtype=q.dtype)
    found, wanted = (
        torch.autograd.grad(attend(q, k, v, made, 0.3, softcap=2.0), [q, k, v], weights)
        for attend in (blockwise_attention, reference_attention)
    )
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, wanted, strict=True))
    assert (blockwise_attention(q, k, v, made, 0.3)[1] == 0).all()


def test_dropout_keeps_the_mean():
    q, k, v = tensors(90)
    made = plan(METHODS["rerope"], whole(90), LAYOUTS[0])
    torch.manual_seed(0)
    dropped = torch.stack([blockwise_attention(q, k, v, made, 0.3, dropout=0.2) for _ in range(400)])
    assert (dropped[0] - dropped[1]).abs().max() > 0.1
    assert torch.allclose(dropped.mean(0), reference_attention(q, k, v, made, 0.3), atol=0.2)


@settings(deadline=None, max_examples=200)
@given(intervals(), st.sampled_from([7, 16, 2048]))
def test_every_pair_of_query_and_key_is_in_exactly_one_piece(ends, tile):
    begin, middle = ends
    length = len(begin)
    spans = [
        Span(lambda m: middle[m], lambda m: m),
        Span(lambda m: begin[m], lambda m: middle[m] - 1),
    ]
    (segment,) = whole(length)
    schedule = make_schedule(segment, spans, tile)
    count = torch.zeros(2, length, length, dtype=torch.long)
    for first, last, pieces in schedule.tiles:
        for piece in pieces:
            assert first <= piece.begin < piece.end <= last
            rows = torch.arange(piece.end - piece.begin)[:, None]
            keys = torch.arange(piece.last - piece.first)
            size = min(piece.cut, len(rows)) if piece.shape == "band" else len(rows)
            width = len(keys) - (len(rows) - size)
            inside = {
                "full": rows >= 0,
                "causal": keys <= rows,
                "reversed": keys >= rows,
                "band": (keys >= rows) & (keys <= rows + width - size),
            }[piece.shape]
            count[piece.span, piece.begin : piece.end, piece.first : piece.last] += inside.expand(-1, len(keys)).long()
    keys = torch.arange(length)
    assert torch.equal(count[0].bool(), (keys >= middle[:, None]) & (keys <= torch.arange(length)[:, None]))
    assert torch.equal(count[1].bool(), (keys >= begin[:, None]) & (keys < middle[:, None]))
    assert count.max() <= 1


@pytest.mark.parametrize("name", ["narrow", "rerope", "uniform"])
def test_tensors_that_are_not_contiguous(name):
    """A model's attention may hand over tensors whose last dimension is not the innermost, for which the kernels would
    read other memory."""
    length, (q, k, v) = 300, tensors(300)
    tight = [x.requires_grad_() for x in (by_model(q, LAYOUTS[0]), by_model(k, LAYOUTS[0]), v)]
    loose = [x.detach().mT.contiguous().mT.requires_grad_() for x in tight]
    assert all(x.stride(-1) != 1 for x in loose)
    found, wanted = (tiled_attention(*x, plan(METHODS[name], whole(length), LAYOUTS[0]), 0.3) for x in (loose, tight))
    assert torch.allclose(found, wanted, atol=1e-9)
    for one, other in zip(
        torch.autograd.grad(found.sum(), loose), torch.autograd.grad(wanted.sum(), tight), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(0, 300), st.integers(1, 400), st.integers(0, 2**16))
def test_block_masks_from_bounds_are_those_that_are_tried_key_by_key(length, past, window, seed):
    """Which blocks are whole, which are cut, which are not touched; queries that see nothing included."""
    last = torch.arange(past, past + length).expand(2, -1).clone()
    first = (last - window + 1).clamp(min=0)
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.rand(2, length, generator=generator) < 0.1
    first[nothing], last[nothing] = 1, 0
    keys = past + length
    found = block_mask(first, last, keys)
    wanted = create_block_mask(found.mask_mod, 2, None, length, keys, device="cpu")
    for kind in ("kv", "full_kv"):
        numbers, lists = (
            [getattr(mask, f"{kind}_{name}") for mask in (found, wanted)] for name in ("num_blocks", "indices")
        )
        assert torch.equal(*numbers)
        for row, (ours, theirs) in enumerate(zip(*(x.flatten(0, -2) for x in lists), strict=True)):
            count = numbers[0].flatten()[row]
            assert set(ours[:count].tolist()) == set(theirs[:count].tolist())
    assert torch.equal(found.to_dense(), wanted.to_dense())
