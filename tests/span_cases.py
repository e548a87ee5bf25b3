"""One line a span method or combination: what the shared tests call it with, at a trained length of 64."""

import math

from cases import long_factors
from rope_scaling import (
    Alternating,
    AngleClip,
    Constant,
    DualChunk,
    DynamicLinear,
    DynamicLongRope,
    DynamicNtk,
    DynamicYarn,
    LeakyReRope,
    Llama4,
    LmInfinite,
    LogN,
    ReRope,
    SelfExtend,
    SlidingWindow,
    Streaming,
    String,
    WavePrune,
    Yarn,
)


def dynamic_longrope(num_pairs):
    return DynamicLongRope(long_factor=tuple(long_factors(num_pairs)), factor=4.0)


# Name: the methods of one patch, or a function that makes them from the number of pairs.
SPAN_CASES = {
    "sliding_window": [SlidingWindow(window=40)],
    "sliding_window-sinks": [SlidingWindow(window=24, num_sinks=3)],
    "lm_infinite": [LmInfinite(window=40, num_sinks=5)],
    "streaming": [Streaming(window=28, num_sinks=4)],
    "rerope": [ReRope()],
    "leaky_rerope": [LeakyReRope(window=30, slope=5.0)],
    "self_extend": [SelfExtend(window=30, group_size=7)],
    "dual_chunk": [DualChunk()],
    "string": [String()],
    "angle_clip": [AngleClip()],
    "angle_clip-uniform": [AngleClip(max_angle=math.pi)],
    "angle_clip-pairs": [lambda pairs: AngleClip(max_angles=tuple([math.inf, 0.0] + [2.0] * (pairs - 2)))],
    "waveprune": [WavePrune()],
    "alternating": [Alternating(local=LmInfinite(window=20), everywhere=ReRope(window=30), global_every=2)],
    "dynamic_linear": [DynamicLinear()],
    "dynamic_ntk": [DynamicNtk(steps=(1.0, 1.5, 2.0, 3.0))],
    "dynamic_yarn": [DynamicYarn()],
    "dynamic_yarn-frozen": [DynamicYarn().freeze(200)],
    "dynamic_longrope": [dynamic_longrope],
    "log_n": [LogN()],
    "llama4": [Llama4(floor_scale=16)],
    "constant": [Constant(value=1.2)],
    "rerope+log_n": [ReRope(), LogN()],
    "yarn+window+llama4": [Yarn(factor=2.0), SlidingWindow(window=50, num_sinks=4), Llama4(floor_scale=16)],
    "dual_chunk+window": [DualChunk(), SlidingWindow(window=70, num_sinks=4)],
    "dynamic_ntk+window": [DynamicNtk(), SlidingWindow(window=50)],
}


def methods_of(name, num_pairs):
    """The methods of a case for a model that rotates so many pairs."""
    return [one(num_pairs) if callable(one) else one for one in SPAN_CASES[name]]
