"""Every message says what was given, what is allowed, what to do."""

import pytest

from rope_scaling import LongRope, Resonance, RopeGeometry, RopeScalingError, make_method


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("yran", {"factor": 4}, r"Unknown method 'yran'\. Did you mean 'yarn'\? Available: abf, "),
        ("yarn", {"factr": 4}, r"Unknown argument of 'yarn': 'factr'\. Did you mean 'factor'\?"),
        ("yarn", {}, r"'yarn' needs `factor`; got nothing"),
        ("yarn", {"factor": 0.5}, r"`factor` must be a finite number, at least 1; got 0\.5"),
        ("linear", {"factor": float("nan")}, r"`factor` must be a finite number, at least 1; got nan"),
        ("linear", {"factor": float("inf")}, r"`factor` must be a finite number.*got inf"),
        ("ntk", {"factor": "four"}, r"`factor` must be a finite number.*got 'four'"),
        ("ntk", {"factor": True}, r"`factor` must be a finite number.*got True"),
        (
            "yarn",
            {"factor": 4, "beta_fast": 1, "beta_slow": 32},
            r"`beta_fast`.*at least `beta_slow`.*beta_fast=1, beta_slow=32",
        ),
        ("llama3", {"factor": 8, "low_freq_factor": 4, "high_freq_factor": 3}, r"`high_freq_factor` must be at least"),
        ("abf", {}, r"`abf` needs a new base.*got neither"),
        ("abf", {"rope_theta": 1.0}, r"`rope_theta` must be a finite number, above 1; got 1\.0"),
        ("power", {}, r"`power` needs an `exponent`"),
        ("truncated", {"cutoff_length": 0}, r"`cutoff_length` must be a whole number of tokens, at least 1; got 0"),
        ("clipped_frequency", {"num_pairs": 2.5}, r"`num_pairs` must be a whole number.*got 2\.5"),
        ("p_rope", {"partial_rotary_factor": 1.5}, r"between 0 and 1; got 1\.5"),
        ("drope", {"attention_factor": 0.0}, r"`attention_factor` must be a finite number, above 0; got 0\.0"),
        ("longrope", {"factor": 2, "long_factor": "1,2"}, r"`long_factor` must be a list of one or more; got '1,2'"),
        (
            "longrope",
            {"factor": 2, "long_factor": [1.0, float("nan")]},
            r"`long_factor\[1\]` must be a finite number, above 0; got nan",
        ),
        ("resonance", {"wrapped": 3}, r"`wrapped` must be a frequency method such as `Yarn\(factor=4\)`; got 3"),
        ("resonance", {"wrapped": "yran", "factor": 4}, r"Unknown method 'yran'\. Did you mean 'yarn'\?"),
    ],
)
def test_message(name, arguments, message):
    with pytest.raises(RopeScalingError, match=message):
        make_method(name, **arguments)


def test_wrong_number_of_longrope_factors():
    geometry = RopeGeometry(rotary_dim=64, rope_theta=1e4, original_max_position_embeddings=4096)
    with pytest.raises(RopeScalingError, match=r"`long_factor` has 3 numbers; this model rotates 32 pairs"):
        LongRope(factor=2, long_factor=(1.0, 2.0, 3.0)).inv_freq(geometry)
    with pytest.raises(RopeScalingError, match=r"`short_factor` has 1 numbers"):
        LongRope(factor=2, long_factor=(1.0,) * 32, short_factor=(1.0,)).inv_freq(geometry)


def test_more_clipped_pairs_than_there_are():
    geometry = RopeGeometry(rotary_dim=16, rope_theta=1e4, original_max_position_embeddings=4096)
    with pytest.raises(RopeScalingError, match="`num_pairs` is 20; this model rotates 8 pairs"):
        make_method("clipped_frequency", num_pairs=20).inv_freq(geometry)


def test_resonance_alone_rounds_the_pretrained_wavelengths():
    geometry = RopeGeometry(rotary_dim=16, rope_theta=1e4, original_max_position_embeddings=4096)
    assert Resonance().inv_freq(geometry)[1] == 1.0
