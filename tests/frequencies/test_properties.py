"""What holds for every model, not only for the usual ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import METHOD_CASES, arguments_of
from rope_scaling import RopeGeometry, default_inv_freq, make_method


GEOMETRY = st.builds(
    lambda pairs, theta, length: RopeGeometry(
        rotary_dim=2 * pairs, rope_theta=theta, original_max_position_embeddings=length
    ),
    st.integers(2, 64),
    st.floats(100, 1e9),
    st.integers(16, 2**20),
)
FACTOR = st.floats(1, 1000)
LENGTH_METHODS = [name for name, (_, takes_factor) in METHOD_CASES.items() if takes_factor]


@pytest.mark.parametrize("name", METHOD_CASES)
@settings(max_examples=60, deadline=None)
@given(geometry=GEOMETRY, factor=FACTOR)
def test_frequencies_are_finite_and_slow_down_only(name, geometry, factor):
    inv_freq, attention_factor = make_method(name, **arguments_of(name, geometry.num_pairs, factor)).inv_freq(geometry)
    assert inv_freq.shape == (geometry.num_pairs,) and inv_freq.dtype == torch.float32
    assert torch.isfinite(inv_freq).all() and (inv_freq >= 0).all()
    assert math.isfinite(attention_factor) and attention_factor > 0
    # Rounding a wavelength to whole tokens may shorten it by up to half a token, a sixth of the shortest.
    allowed = 1.1 if name == "resonance" else 1 + 1e-6
    assert (inv_freq.double() <= default_inv_freq(geometry) * allowed).all()


@pytest.mark.parametrize("name", sorted(set(LENGTH_METHODS) - {"resonance", "longrope", "abf", "linear"}))
@settings(max_examples=60, deadline=None)
@given(geometry=GEOMETRY, factor=FACTOR)
def test_no_pair_is_slowed_by_more_than_the_factor(name, geometry, factor):
    inv_freq, _ = make_method(name, **arguments_of(name, geometry.num_pairs, factor)).frequencies(geometry)
    assert (default_inv_freq(geometry) / inv_freq <= factor * (1 + 1e-9)).all()
