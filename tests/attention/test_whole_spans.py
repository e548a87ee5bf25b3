"""The engine for GPUs, run on a CPU through twins of its kernels, against the reference implementation."""

import pytest
import torch
from attention_twins import TWINS
from engine_cases import L0, LAYOUTS, METHODS, by_model, intervals, plan, tensors, whole
from hypothesis import given, settings

from rope_scaling import LogN, SlidingWindow
from rope_scaling.attention import blocks, kernels
from rope_scaling.attention.blocks import make_blocks
from rope_scaling.attention.reference import reference_attention
from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.whole_spans import whole_span_attention
from rope_scaling.spans import Span


@pytest.fixture(params=TWINS)
def twin(request, monkeypatch):
    monkeypatch.setattr(kernels, "_LARGE", 48)  # so that the large kernel has its part of short sequences
    return TWINS[request.param]


@pytest.mark.parametrize("length", [1, 65, 301])
@pytest.mark.parametrize("name", [*METHODS, "plain"])
def test_whole_spans_are_the_reference(name, length, twin):
    q, k, v = tensors(length)
    q, k = (by_model(x, LAYOUTS[0]) for x in (q, k))
    made = plan(METHODS.get(name), whole(length), LAYOUTS[0])
    found = whole_span_attention(q, k, v, made, 0.3, twin)
    assert torch.allclose(found, reference_attention(q, k, v, made, 0.3), atol=1e-6)  # log-sum-exps are float32


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_reference(name, twin):
    length = 333
    q, k, v = tensors(length, dtype=torch.float32)
    sinks = torch.randn(4, requires_grad=True)
    inputs = [x.requires_grad_() for x in (by_model(q, LAYOUTS[1]), by_model(k, LAYOUTS[1]), v)]
    made = plan(METHODS[name], whole(length), LAYOUTS[1], temperature=lambda m: LogN().scale(m, L0))
    weights = torch.randn(q.shape)
    one = torch.autograd.grad(whole_span_attention(*inputs, made, 0.3, twin, sinks=sinks), [*inputs, sinks], weights)
    other = torch.autograd.grad(reference_attention(*inputs, made, 0.3, sinks=sinks), [*inputs, sinks], weights)
    for found, wanted in zip(one, other, strict=True):
        assert torch.allclose(found, wanted, atol=2e-4)


def test_rows_apart_and_rows_outside(twin):
    q, k, v = tensors(120, rows=3)
    positions = torch.arange(50)
    segments = [
        Segment(slice(0, 1), slice(0, 50), slice(0, 50), positions, positions),
        Segment(slice(0, 1), slice(50, 100), slice(50, 100), positions, positions),
        Segment(slice(2, 3), slice(70, 120), slice(70, 120), positions, positions),
    ]
    made = plan(METHODS["rerope"], segments, LAYOUTS[0])
    found = whole_span_attention(q, k, v, made, 0.3, twin)
    assert torch.allclose(found, reference_attention(q, k, v, made, 0.3), atol=1e-6)
    assert (found[1] == 0).all() and (found[0, :, 100:] == 0).all() and (found[2, :, :70] == 0).all()


@pytest.mark.parametrize("native", [True, False])
@settings(deadline=None, max_examples=200)
@given(intervals())
def test_every_pair_of_query_and_key_is_in_exactly_one_block(native, ends):
    begin, middle = ends
    length = len(begin)
    spans = [Span(lambda m: middle[m], lambda m: m), Span(lambda m: begin[m], lambda m: middle[m] - 1)]
    (segment,) = whole(length)
    count, touched = torch.zeros(2, length, length, dtype=torch.long), torch.zeros(length, dtype=torch.bool)
    for block in make_blocks(segment, spans, lambda width, queries: native):
        rows, keys = torch.arange(block.queries)[:, None], torch.arange(block.keys)
        inside = {
            "full": keys >= 0,
            "causal": keys <= rows,
            "reversed": keys >= rows,
            "band": (keys >= rows) & (keys <= rows + block.keys - block.queries),
        }[block.shape].expand(block.queries, block.keys)
        for index in range(block.count):
            at, first = block.begin + index * block.query_step, block.first + index * block.key_step
            assert not (block.is_first and touched[at : at + block.queries].any())
            count[block.span, at : at + block.queries, first : first + block.keys] += inside
        for index in range(block.count):
            touched[block.begin + index * block.query_step :][: block.queries] = True
    for span, counted in zip(spans, count, strict=True):
        first, last = segment.bounds(span)
        keys = torch.arange(length)
        assert torch.equal(counted, ((keys >= first[:, None]) & (keys <= last[:, None])).long())


def test_blocks_are_few(monkeypatch):
    """At 64k tokens: the chunks of a window in batches, the rest of a method in a call or two."""
    (segment,) = whole(65536)
    window = SlidingWindow(window=4096).spans(None)
    counts = {}
    for native in (True, False):
        made = make_blocks(segment, window, lambda width, queries, native=native: native)
        counts[native] = [(block.shape, block.count) for block in made]
    assert counts[True] == [("causal", 1), ("band", 1)]
    assert counts[False] == [("causal", 16), ("reversed", 8), ("reversed", 7)]
    assert blocks.LARGEST_BATCH == 8 * 4096
