"""Span methods: which keys a query sees, and at which angle. Adding one is a file, an import and a line."""

from __future__ import annotations

from rope_scaling.spans.alternating import Alternating
from rope_scaling.spans.angle_clip import AngleClip
from rope_scaling.spans.base import Angles, Rope, Span, SpanMethod, compose, plain
from rope_scaling.spans.dual_chunk import DualChunk
from rope_scaling.spans.dynamic import Dynamic, DynamicLinear, DynamicLongRope, DynamicNtk, DynamicYarn
from rope_scaling.spans.leaky_rerope import LeakyReRope
from rope_scaling.spans.lm_infinite import LmInfinite
from rope_scaling.spans.rerope import ReRope
from rope_scaling.spans.self_extend import SelfExtend
from rope_scaling.spans.sliding_window import SlidingWindow
from rope_scaling.spans.streaming import Streaming
from rope_scaling.spans.string import String
from rope_scaling.spans.waveprune import WavePrune


SPAN_METHODS: dict[str, type[SpanMethod]] = {
    "sliding_window": SlidingWindow,
    "lm_infinite": LmInfinite,
    "streaming": Streaming,
    "rerope": ReRope,
    "leaky_rerope": LeakyReRope,
    "self_extend": SelfExtend,
    "dual_chunk": DualChunk,
    "string": String,
    "angle_clip": AngleClip,
    "waveprune": WavePrune,
    "alternating": Alternating,
    "dynamic_linear": DynamicLinear,
    "dynamic_ntk": DynamicNtk,
    "dynamic_yarn": DynamicYarn,
    "dynamic_longrope": DynamicLongRope,
}

__all__ = [
    "SPAN_METHODS",
    "Alternating",
    "AngleClip",
    "Angles",
    "DualChunk",
    "Dynamic",
    "DynamicLinear",
    "DynamicLongRope",
    "DynamicNtk",
    "DynamicYarn",
    "LeakyReRope",
    "LmInfinite",
    "ReRope",
    "Rope",
    "SelfExtend",
    "SlidingWindow",
    "Span",
    "SpanMethod",
    "Streaming",
    "String",
    "WavePrune",
    "compose",
    "plain",
]
