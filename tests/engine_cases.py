"""Methods, tensors and plans that the tests of all attention engines share."""

import math

import torch
from hypothesis import strategies as st

from rope_scaling import (
    AngleClip,
    DualChunk,
    DynamicNtk,
    DynamicYarn,
    LmInfinite,
    ReRope,
    RopeGeometry,
    SelfExtend,
    SlidingWindow,
    String,
    WavePrune,
    default_inv_freq,
)
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.attention.sequences import Segment
from rope_scaling.spans import Rope, plain


L0, WIDTH = 64, 16
GEOMETRY = RopeGeometry(rotary_dim=WIDTH, rope_theta=1e4, original_max_position_embeddings=L0)
INV_FREQ = default_inv_freq(GEOMETRY).float()
ROPE = Rope(GEOMETRY, INV_FREQ.double(), L0)
METHODS = {
    "window": SlidingWindow(window=100, num_sinks=3),
    "narrow": SlidingWindow(window=5, num_sinks=2),
    "lm_infinite": LmInfinite(window=300, num_sinks=20),
    "rerope": ReRope(),
    "self_extend": SelfExtend(window=50, group_size=7),
    "dual_chunk": DualChunk(),
    "string": String(),
    "clip": AngleClip(),
    "uniform": AngleClip(max_angle=math.pi),
    "waveprune": WavePrune(),
    "dynamic_ntk": DynamicNtk(steps=(1.0, 1.7, 4.0)),
    "dynamic_yarn": DynamicYarn(),
}


def tensors(length, head_dim=24, rows=2, heads=4, groups=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = [(rows, heads, length, head_dim), *[(rows, heads // groups, length, head_dim)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_model(x, layout, offset=0):
    """Rotated as a model rotates it, in float32 angles."""
    positions = torch.arange(x.shape[2]) + offset
    rotation = Rotation.by((positions.float()[:, None] * INV_FREQ).double())
    return x if rotation is None else rotation.apply(x, layout)


def whole(length, rows=2, offset=0):
    positions = torch.arange(length)
    return [Segment(slice(0, rows), slice(0, length), slice(0, length), positions, positions, offset)]


def plan(method, segments, layout, tile=None, **more):
    return Plan(method.spans(ROPE) if method else plain(), segments, layout, INV_FREQ, tile=tile, **more)


LAYOUTS = [RotaryLayout(WIDTH), RotaryLayout(WIDTH, interleaved=True), RotaryLayout(WIDTH, start=8)]


@st.composite
def intervals(draw):
    """Disjoint intervals of any form that spans may have: ends that stand, advance or jump, never back."""
    length = draw(st.integers(1, 60))
    cut = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    low = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
    middle, begin = [], []
    for query in range(length):
        middle.append(min((middle[-1] if middle else 0) + cut[query], query))
        begin.append(min((begin[-1] if begin else 0) + low[query], middle[-1]))
    return torch.tensor(begin), torch.tensor(middle)
