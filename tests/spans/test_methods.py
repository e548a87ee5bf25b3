"""Every span method against its definition, position by position; and what the definitions promise."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope_scaling
from references import distances
from rope_scaling import AngleClip, RopeGeometry, RopeScalingError, SelfExtend, default_inv_freq, relative_positions
from rope_scaling.spans import Rope
from rope_scaling.spans.base import check_spans


WIDTH, BASE, L0, LENGTH = 16, 100.0, 24, 75
GEOMETRY = RopeGeometry(rotary_dim=WIDTH, rope_theta=BASE, original_max_position_embeddings=L0)

CASES = [
    ("sliding_window", {"window": 10}),
    ("sliding_window", {"window": 7, "num_sinks": 3}),
    ("lm_infinite", {"window": 9, "num_sinks": 4}),
    ("streaming", {"window": 9, "num_sinks": 2}),
    ("rerope", {"window": 8}),
    ("leaky_rerope", {"window": 10, "slope": 4.0}),
    ("leaky_rerope", {"window": 9, "slope": 2.5}),
    ("self_extend", {"window": 12, "group_size": 4}),
    ("self_extend", {"window": 10, "group_size": 4}),  # a group that does not divide the window
    ("dual_chunk", {"chunk_size": 18, "local_size": 3}),
    ("dual_chunk", {"chunk_size": 12, "local_size": 8}),
    ("string", {"shift": 8, "window": 3}),
    ("angle_clip", {"saturation_length": 12}),
    ("angle_clip", {"max_angle": math.pi}),
    ("angle_clip", {"max_angle": 0.5}),
    ("waveprune", {}),
    ("waveprune", {"alpha": 0.3}),
    ("dynamic_linear", {"steps": (1.0, 2.0, 4.0)}),
    ("dynamic_ntk", {"steps": (1.0, 1.5, 3.0)}),
]
DEFAULTS = {
    "sliding_window": {"window": L0},
    "lm_infinite": {"window": L0, "num_sinks": 10},
    "streaming": {"window": L0 - 4, "num_sinks": 4},
    "rerope": {"window": L0 // 2},
    "leaky_rerope": {"window": L0 // 2, "slope": 16.0},
    "self_extend": {"window": L0 // 2, "group_size": 8},
    "dual_chunk": {"chunk_size": 18, "local_size": 3},
    "string": {"shift": 8, "window": 2},
    "angle_clip": {"saturation_length": L0 // 2},
    "waveprune": {"alpha": 1.0},
    "dynamic_linear": {"steps": (1, 2, 4, 8)},
    "dynamic_ntk": {"steps": (1, 2, 4, 8)},
}


def expected(name, arguments):
    formula = getattr(distances, name)
    more = {"width": WIDTH, "base": BASE} if "width" in inspect.signature(formula).parameters else {}
    found = torch.full((LENGTH, LENGTH, WIDTH // 2), torch.nan, dtype=torch.float64)
    for m in range(LENGTH):
        for n in range(m + 1):
            for i in range(WIDTH // 2):
                angle = formula(m, n, i, distances.theta(i, WIDTH, BASE), L0, **arguments, **more)
                found[m, n, i] = math.nan if angle is None else angle
    return found


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_definition(name, arguments):
    found = relative_positions(name, LENGTH, geometry=GEOMETRY, angles=True, **arguments)
    assert torch.allclose(found, expected(name, arguments), atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    found = relative_positions(name, LENGTH, geometry=GEOMETRY, angles=True)
    assert torch.allclose(found, expected(name, DEFAULTS[name]), atol=1e-9, equal_nan=True)


def test_distances_are_those_of_the_docstring():
    found = relative_positions("self_extend", 16, window=4, group_size=2, trained_length=8)
    assert found.shape == (16, 16) and found.dtype == torch.float64
    assert found[15].tolist() == [9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 2, 1, 0]
    assert torch.isnan(found[3, 4])


@pytest.mark.parametrize(
    "name", [name for name in DEFAULTS if name != "waveprune"]
)  # which takes fast pairs out, by definition
def test_nothing_changes_at_short_range(name):
    """Each method leaves a text of a fifth of the trained length as it is."""
    short = L0 // 5
    found = relative_positions(name, short, geometry=GEOMETRY)
    plain = torch.arange(short)[:, None] - torch.arange(short)
    assert torch.allclose(found.nan_to_num(-1), plain.double().tril().where(plain >= 0, -1.0))


@pytest.mark.parametrize("name", ["leaky_rerope", "self_extend", "string"])
def test_reach_is_the_last_length_whose_distances_were_trained(name):
    method = rope_scaling.make_method(name)
    rope = Rope(GEOMETRY, default_inv_freq(GEOMETRY), L0)
    reach = method.reach(rope)
    inside = relative_positions(method, reach, geometry=GEOMETRY).nan_to_num(0).max()
    beyond = relative_positions(method, reach + 2 * L0, geometry=GEOMETRY).nan_to_num(0).max()
    assert inside < L0 <= beyond


@pytest.mark.parametrize("name", ["rerope", "dual_chunk", "lm_infinite", "streaming", "sliding_window"])
def test_methods_without_a_limit_stay_inside_the_trained_distances(name):
    method = rope_scaling.make_method(name)
    assert method.reach(Rope(GEOMETRY, default_inv_freq(GEOMETRY), L0)) is None
    assert relative_positions(method, 10 * L0, geometry=GEOMETRY).nan_to_num(0).max() <= L0


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, math.pi), st.integers(2, 32), st.floats(50, 1e6))
def test_aligned_vectors_score_less_the_farther_they_are(angle, pairs, base):
    """For `phi <= pi`, the sum of `cos psi_i(D)` never rises with distance."""
    geometry = RopeGeometry(rotary_dim=2 * pairs, rope_theta=base, original_max_position_embeddings=64)
    angles = relative_positions(AngleClip(max_angle=angle), 200, geometry=geometry, angles=True)[-1]
    scores = angles.cos().sum(-1).flip(0)
    assert (scores.diff() <= 1e-9).all()


def test_beyond_pi_they_may_score_more():
    geometry = RopeGeometry(rotary_dim=32, rope_theta=1e4, original_max_position_embeddings=64)
    angles = relative_positions(AngleClip(max_angle=2 * math.pi), 200, geometry=geometry, angles=True)[-1]
    assert (angles.cos().sum(-1).flip(0).diff() > 0.01).any()


def test_other_vectors_need_not_either():
    """The theorem is about aligned vectors; documentation must not claim more."""
    geometry = RopeGeometry(rotary_dim=32, rope_theta=1e4, original_max_position_embeddings=64)
    angles = relative_positions(AngleClip(max_angle=math.pi), 200, geometry=geometry, angles=True)[-1]
    phases = torch.rand(16, generator=torch.Generator().manual_seed(0)).double() * 2 * math.pi
    assert ((angles + phases).cos().sum(-1).flip(0).diff() > 0.01).any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sliding_window", {"window": 0}, "`window` must be a whole number of tokens, at least 1; got 0"),
        ("sliding_window", {"window": -3}, "`window` must be a whole number of tokens, at least 1; got -3"),
        ("sliding_window", {"window": 4, "num_sinks": 4}, "there must be fewer of them than the window holds"),
        ("sliding_window", {"num_sinks": -1}, "`num_sinks` must be a whole number, at least 0; got -1"),
        (
            "streaming",
            {"num_sinks": 0},
            "`num_sinks` must be at least 1; got 0. For a window without sinks use `sliding_window`",
        ),
        ("leaky_rerope", {"slope": 0.5}, "`slope` must be a finite number, at least 1; got 0.5"),
        ("self_extend", {"group_size": 0}, "`group_size` must be a whole number of tokens, at least 1"),
        ("angle_clip", {"max_angle": 0}, "`max_angle` must be a finite number, above 0; got 0"),
        ("angle_clip", {"max_angle": 1.0, "saturation_length": 8}, "Give one of `saturation_length`, `max_angle`"),
        ("dynamic_ntk", {"steps": (2, 1)}, r"ascending factors, as in \(1, 2, 4\); got \(2, 1\)"),
        ("dynamic_ntk", {"length": 0}, "`length` must be a whole number of tokens"),
        ("alternating", {"layer_kinds": ["lokal"]}, "Unknown kind of layer 'lokal'. Did you mean 'local'"),
        ("llama4", {"floor_scale": 0}, "`floor_scale` must be a whole number of tokens"),
        ("constant", {"value": -1}, "`value` must be a finite number, above 0"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(RopeScalingError, match=message):
        rope_scaling.make_method(name, **arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SelfExtend(window=24), "`window` is 24 and the model was trained on 24 tokens, so no room is left"),
        (AngleClip(max_angles=(1.0, 2.0)), "`max_angles` has 2 numbers; this model rotates 8 pairs"),
        (AngleClip(saturation_length=1000), "No pair of this model has a wavelength beyond 1000 tokens"),
        (rope_scaling.DualChunk(chunk_size=30), "no larger than the trained length of 24"),
        (rope_scaling.String(shift=4, window=8), "keys would be pushed away"),
    ],
)
def test_arguments_that_do_not_suit_the_model(method, message):
    with pytest.raises(RopeScalingError, match=message):
        relative_positions(method, LENGTH, geometry=GEOMETRY)


@pytest.mark.parametrize("name", ["rerope", "lm_infinite", "streaming", "sliding_window"])
def test_windows_beyond_the_trained_length_reach_no_further_than_that(name):
    rope = Rope(GEOMETRY, default_inv_freq(GEOMETRY), L0)
    assert rope_scaling.make_method(name, window=L0 + 5).reach(rope) == L0
    assert rope_scaling.SlidingWindow(num_sinks=4).reach(rope) == L0  # sinks at their true distance


def test_more_sinks_than_the_default_window_holds():
    with pytest.raises(RopeScalingError, match="`num_sinks` is 30 and `window` 24"):
        relative_positions("sliding_window", LENGTH, geometry=GEOMETRY, num_sinks=30)


def test_arguments_that_would_be_ignored_are_refused():
    with pytest.raises(RopeScalingError, match="`window`: a method object carries its own fields"):
        relative_positions(SelfExtend(), LENGTH, geometry=GEOMETRY, window=3)
    with pytest.raises(RopeScalingError, match="`trained_length` is 8 and the geometry has 24"):
        relative_positions("rerope", LENGTH, geometry=GEOMETRY, trained_length=8)


def test_only_span_methods_have_positions():
    with pytest.raises(RopeScalingError, match="'yarn' is not a span method"):
        relative_positions("yarn", 10, factor=4.0)


@pytest.mark.parametrize("name", [*DEFAULTS, "dynamic_yarn", "alternating"])
def test_every_method_passes_the_check_of_users_own(name):
    rope = Rope(GEOMETRY, default_inv_freq(GEOMETRY), L0, num_layers=12)
    check_spans(rope_scaling.make_method(name).spans(rope), name, rope)


def test_temperatures():
    positions = torch.tensor([0, 98, 99, 9999])
    log_n = rope_scaling.LogN().scale(positions, 100)
    assert torch.allclose(log_n, torch.tensor([1.0, 1.0, 1.0, 2.0]).double())
    llama4 = rope_scaling.Llama4(floor_scale=100).scale(positions, 50)
    wanted = [1.0, 1.0, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(101)]
    assert torch.allclose(llama4, torch.tensor(wanted).double())
    assert rope_scaling.Constant(value=1.5).scale(positions, 1).tolist() == [1.5] * 4
