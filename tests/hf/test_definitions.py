"""Whole patched models against a model computed by hand from the definitions, pair by pair.

Nothing of the library is used for it: a second witness of what only shows in scores, such as amplitudes, temperatures
and methods that go by layer or position.
"""

import math

import pytest
import torch
from conftest import TRAINED_LENGTH, logits, make_model, token_ids

import rope_scaling
from cases import long_factors
from references import distances, formulas
from rope_scaling import (
    Alternating,
    AngleClip,
    Constant,
    DualChunk,
    DynamicLongRope,
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


LENGTH, PAIRS, BASE = 150, 8, 10000.0
THETA = [distances.theta(i, 2 * PAIRS, BASE) for i in range(PAIRS)]


def by(name, **arguments):
    """The relative angle of pair `i`, from `references/distances.py`."""
    formula = getattr(distances, name)
    return lambda layer, m, n, i: formula(m, n, i, THETA[i], TRAINED_LENGTH, **arguments)


def plain(layer, m, n, i):
    return (m - n) * THETA[i]


def yarn_step(m):
    """Frequencies and attention factor of YaRN at the power of two that reaches the query."""
    step = next(step for step in (1, 2, 4, 8) if m + 1 <= TRAINED_LENGTH * step)
    return formulas.yarn(2 * PAIRS, BASE, TRAINED_LENGTH, step) if step > 1 else (THETA, 1.0)


def long_step(m):
    factors = long_factors(PAIRS) if m + 1 > TRAINED_LENGTH else [1.0] * PAIRS
    return [theta / factor for theta, factor in zip(THETA, factors, strict=True)]


def alternating(layer, m, n, i):
    if layer % 2:
        return distances.rerope(m, n, i, THETA[i], TRAINED_LENGTH, 30)
    return distances.lm_infinite(m, n, i, THETA[i], TRAINED_LENGTH, 20, 10)


def log_n(m):
    return max(1.0, math.log(m + 1) / math.log(TRAINED_LENGTH))


YARN_2 = formulas.yarn(2 * PAIRS, BASE, TRAINED_LENGTH, 2.0)
# Methods of a patch, the relative angle of a pair, and what the score of a query at `m` is multiplied with.
DEFINITIONS = {
    "sliding_window": ([SlidingWindow(window=24, num_sinks=3)], by("sliding_window", window=24, num_sinks=3), None),
    "lm_infinite": ([LmInfinite(window=40, num_sinks=5)], by("lm_infinite", window=40, num_sinks=5), None),
    "streaming": ([Streaming(window=28, num_sinks=4)], by("streaming", window=28, num_sinks=4), None),
    "rerope": ([ReRope(window=20)], by("rerope", window=20), None),
    "leaky_rerope": ([LeakyReRope(window=30, slope=5.0)], by("leaky_rerope", window=30, slope=5.0), None),
    "self_extend": ([SelfExtend(window=30, group_size=7)], by("self_extend", window=30, group_size=7), None),
    "dual_chunk": ([DualChunk(chunk_size=48, local_size=8)], by("dual_chunk", chunk_size=48, local_size=8), None),
    "string": (
        [String(shift=24, window=6)],
        by("string", shift=24, window=6),
        lambda m: (0.1 * math.log(2) + 1) ** 2,
    ),
    "angle_clip": ([AngleClip(max_angle=math.pi)], by("angle_clip", max_angle=math.pi), None),
    "waveprune": ([WavePrune()], by("waveprune"), None),
    "alternating": (
        [Alternating(local=LmInfinite(window=20, num_sinks=10), everywhere=ReRope(window=30), global_every=2)],
        alternating,
        None,
    ),
    "dynamic_yarn": (
        [DynamicYarn()],
        lambda layer, m, n, i: (m - n) * yarn_step(m)[0][i],
        lambda m: yarn_step(m)[1] ** 2,
    ),
    "dynamic_longrope": (
        [DynamicLongRope(long_factor=tuple(long_factors(PAIRS)), factor=4.0)],
        lambda layer, m, n, i: (m - n) * long_step(m)[i],
        lambda m: 1 + math.log(4) / math.log(TRAINED_LENGTH),
    ),
    "log_n": ([LogN()], plain, log_n),
    "llama4": ([Llama4(floor_scale=16)], plain, lambda m: 1 + 0.1 * math.log(1 + (m + 1) // 16)),
    "constant": ([Constant(value=1.2)], plain, lambda m: 1.2),
    "rerope+log_n": ([ReRope(window=20), LogN()], by("rerope", window=20), log_n),
    "yarn+window+llama4": (
        [Yarn(factor=2.0), SlidingWindow(window=50, num_sinks=4), Llama4(floor_scale=16)],
        lambda layer, m, n, i: (m - n) * YARN_2[0][i] if m - n < 50 or n < 4 else None,
        lambda m: YARN_2[1] ** 2 * (1 + 0.1 * math.log(1 + (m + 1) // 16)),
    ),
}


def tabled(angle, layer):
    """Angles `[T, T, pairs]`, NaN where a pair does not count; and which keys each query sees, `[T, T]`."""
    angles = torch.full((LENGTH, LENGTH, PAIRS), math.nan, dtype=torch.float64)
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for m in range(LENGTH):
        for n in range(m + 1):
            found = [angle(layer, m, n, i) for i in range(PAIRS)]
            seen[m, n] = any(one is not None for one in found)
            angles[m, n] = torch.tensor([math.nan if one is None else one for one in found], dtype=torch.float64)
    return angles, seen


@torch.no_grad()
def by_hand(model, ids, angle, gain):
    """A Llama's logits, with attention from relative angles."""
    inner, heads, width = model.model, model.config.num_attention_heads, 2 * PAIRS
    hidden = inner.embed_tokens(ids)
    gains = torch.tensor([1.0 if gain is None else gain(m) for m in range(LENGTH)], dtype=torch.float64)
    for index, layer in enumerate(inner.layers):
        angles, seen = tabled(angle, index)
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            project(normed).view(1, LENGTH, -1, width).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        (q1, q2), (k1, k2) = (x.split(PAIRS, -1) for x in (q, k))
        cosine, sine = angles.cos().nan_to_num(0), angles.sin().nan_to_num(0)
        scores = torch.einsum("bhmi,bhni,mni->bhmn", q1, k1, cosine) + torch.einsum(
            "bhmi,bhni,mni->bhmn", q2, k2, cosine
        )
        scores += torch.einsum("bhmi,bhni,mni->bhmn", q1, k2, sine) - torch.einsum("bhmi,bhni,mni->bhmn", q2, k1, sine)
        scores = scores * width**-0.5 * gains[:, None]
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(1, LENGTH, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_whole_model_is_its_definition(name):
    methods, angle, gain = DEFINITIONS[name]
    model = make_model("llama", initializer_range=0.15).double()
    ids = token_ids(LENGTH)
    wanted = by_hand(model, ids, angle, gain)
    unpatched = by_hand(model, ids, plain, None)
    rope_scaling.patch(model, *methods)
    found = logits(model, ids)
    # Transformers rotates by angles in float32.
    assert torch.allclose(found, wanted, atol=3e-4) and not torch.allclose(found, unpatched, atol=3e-3)
