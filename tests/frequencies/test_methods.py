"""Three witnesses a method: the formula re-derived, Transformers' own function where there is one, and literals."""

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cases import FORMULA_VARIANTS, GEOMETRIES, METHOD_CASES, arguments_of, reference
from rope_scaling import RopeGeometry, RopeScalingError, Yarn, default_inv_freq, make_method
from rope_scaling.frequencies import METHODS
from rope_scaling.frequencies.base import correction_index, ntk_theta


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "frequencies.json").read_text())
CASES = [(name, geometry) for name in METHODS for geometry in GEOMETRIES]


def make_geometry(values):
    width, base, length = values
    return RopeGeometry(rotary_dim=width, rope_theta=base, original_max_position_embeddings=length)


def close(found, wanted, rtol=1e-6):
    return torch.allclose(found.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=rtol, atol=1e-30)


def test_every_method_has_a_case():
    assert set(METHOD_CASES) == set(METHODS)


@pytest.mark.parametrize(("name", "geometry"), CASES, ids=[f"{n}-{g}" for n, g in CASES])
@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
def test_equals_the_formula(name, geometry, factor):
    values = GEOMETRIES[geometry]
    arguments = arguments_of(name, values[0] // 2, factor)
    inv_freq, attention_factor = make_method(name, **arguments).inv_freq(make_geometry(values))
    wanted, wanted_factor = reference(name, values, arguments)
    assert close(inv_freq, wanted)
    assert attention_factor == pytest.approx(wanted_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments"), FORMULA_VARIANTS, ids=[f"{n}-{'-'.join(a)}" for n, a in FORMULA_VARIANTS]
)
@pytest.mark.parametrize("geometry", ["llama2", "demo", "clamped"])
def test_variants_equal_the_formula(name, arguments, geometry):
    values = GEOMETRIES[geometry]
    inv_freq, attention_factor = make_method(name, **arguments).inv_freq(make_geometry(values))
    wanted, wanted_factor = reference(name, values, arguments)
    assert close(inv_freq, wanted)
    assert attention_factor == pytest.approx(wanted_factor, rel=1e-12)


NATIVE = ["linear", "yarn", "llama3", "longrope", "p_rope"]
NATIVE_VARIANTS = [(name, arguments) for name, arguments in FORMULA_VARIANTS if name in NATIVE and name != "p_rope"]


@pytest.mark.parametrize(("name", "variant"), [*((name, {}) for name in NATIVE), *NATIVE_VARIANTS])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_transformers(name, variant, geometry):
    width, base, length = GEOMETRIES[geometry]
    method = make_method(name, **arguments_of(name, width // 2) | variant)
    parameters = method.rope_parameters(make_geometry(GEOMETRIES[geometry])) | {"rope_theta": base}
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=4 * length, rope_parameters=parameters
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    ours, our_factor = method.inv_freq(make_geometry(GEOMETRIES[geometry]))
    assert close(ours, theirs)
    assert our_factor == pytest.approx(their_factor, rel=1e-9)


def test_ntk_equals_transformers_dynamic_at_the_length_where_its_factor_is_the_same():
    """Transformers' dynamic type uses the same base at `factor * length / trained - (factor - 1)`: 2 * 2.5 - 1 = 4."""
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=int(2.5 * 4096))
    assert close(make_method("ntk", factor=4).inv_freq(make_geometry((128, 1e4, 4096)))[0], theirs)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['method']}-{case['geometry']}")
def test_equals_the_literals(case):
    ones = (
        {"long_factor": [1.0] * (case["geometry"][0] // 2)} if case["arguments"].get("long_factor") == "ones" else {}
    )
    inv_freq, attention_factor = make_method(case["method"], **{**case["arguments"], **ones}).inv_freq(
        make_geometry(case["geometry"])
    )
    assert attention_factor == pytest.approx(case["attention_factor"], rel=1e-9)
    for index, value in case["inv_freq"].items():
        assert inv_freq[int(index)].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("case", GOLDEN["ratios"], ids=lambda case: case["method"])
def test_ratios_equal_the_literals(case):
    geometry = make_geometry(case["geometry"])
    ratio = make_method(case["method"], **case["arguments"]).inv_freq(geometry)[0].double() / default_inv_freq(
        geometry
    )
    for index, value in case["ratio"].items():
        assert ratio[int(index)].item() == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["bases"], ids=lambda case: f"{case['geometry']}-{case['factor']}")
def test_bases_equal_the_literals(case):
    geometry = make_geometry(case["geometry"])
    if "ntk" in case:
        assert ntk_theta(geometry, case["factor"]) == pytest.approx(case["ntk"], rel=1e-9)
    else:
        base = make_method("abf", factor=case["factor"]).base(geometry)
        assert base == pytest.approx(case["abf"], rel=0.5 * 10 ** (1 - case["digits"]))


@pytest.mark.parametrize("case", GOLDEN["bands"], ids=lambda case: f"{case['geometry']}-{case['turns']}")
def test_bands_equal_the_literals(case):
    low, high = (correction_index(make_geometry(case["geometry"]), turns) for turns in case["turns"])
    assert (math.floor(low), math.ceil(high)) == tuple(case["ends"])
    if "raw" in case:
        assert (low, high) == pytest.approx(case["raw"], abs=1e-3)


@pytest.mark.parametrize(
    "name", [name for name, (_, takes_factor) in METHOD_CASES.items() if takes_factor and name != "resonance"]
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_factor_one_is_the_identity(name, geometry):
    made = make_geometry(GEOMETRIES[geometry])
    inv_freq, attention_factor = make_method(name, **arguments_of(name, made.num_pairs, factor=1.0)).inv_freq(made)
    assert close(inv_freq, default_inv_freq(made))
    assert attention_factor == 1.0


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_yarn_keeps_fast_pairs_and_never_speeds_one_up(geometry):
    made = make_geometry(GEOMETRIES[geometry])
    ratio = Yarn(factor=8).frequencies(made)[0] / default_inv_freq(made)
    turns = made.original_max_position_embeddings * default_inv_freq(made) / (2 * math.pi)
    assert torch.allclose(ratio[turns > 64], torch.ones_like(ratio[turns > 64]))
    assert (ratio.diff() <= 1e-12).all()
    assert ratio.min() >= 1 / 8 - 1e-12


def test_ntk_leaves_the_first_pair_and_slows_the_last_by_the_factor():
    made = make_geometry((128, 1e4, 4096))
    ratio = make_method("ntk", factor=7).frequencies(made)[0] / default_inv_freq(made)
    assert ratio[0].item() == 1.0
    assert ratio[-1].item() == pytest.approx(1 / 7, rel=1e-12)


def test_resonance_gives_whole_wavelengths():
    inv_freq, _ = make_method("resonance", wrapped="yarn", factor=4).inv_freq(make_geometry((64, 1e4, 2048)))
    wavelengths = 2 * math.pi / inv_freq.double()
    assert torch.allclose(wavelengths, wavelengths.round(), rtol=1e-6)


def test_resonance_leaves_a_standing_pair_alone():
    inv_freq, _ = make_method("resonance", wrapped="p_rope").inv_freq(make_geometry((64, 1e4, 2048)))
    assert (inv_freq[-8:] == 0).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stays_float32_whatever_the_default_dtype(name, default_dtype):
    made = make_geometry((64, 1e5, 8192))
    method = make_method(name, **arguments_of(name, made.num_pairs))
    wanted = method.inv_freq(made)[0]
    torch.set_default_dtype(default_dtype)
    try:
        found = method.inv_freq(made)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_makes_no_half_precision_tensor(name):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            assert getattr(result, "dtype", None) not in (torch.float16, torch.bfloat16), func
            return result

    made = make_geometry((64, 1e5, 8192))
    with Spy(), torch.autocast("cpu", torch.bfloat16):
        make_method(name, **arguments_of(name, made.num_pairs)).inv_freq(made)


@pytest.mark.parametrize("name", METHODS)
def test_is_a_documented_frozen_dataclass(name):
    cls = METHODS[name]
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls.name == name
    assert cls.paper in cls.__doc__, "the docstring links the paper"
    assert "`" in cls.__doc__ and cls.needs_training in ("no", "helps", "yes")
    source = Path(__import__(cls.__module__, fromlist=["_"]).__file__).read_text()
    inherited = {field.name for base in cls.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    for field in fields(cls):
        if field.name not in inherited:
            declaration = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1]
            assert declaration.lstrip().startswith('"""'), f"{name}.{field.name} has no docstring"


@pytest.mark.parametrize("width", [7, 1, 0, -2])
def test_odd_widths_are_refused(width):
    with pytest.raises(RopeScalingError, match=rf"must be even and at least 2.*got {width}"):
        make_geometry((width, 1e4, 2048))


def test_ntk_refuses_a_single_pair():
    with pytest.raises(RopeScalingError, match="at least two rotated pairs; this model has 1"):
        make_method("ntk", factor=2).inv_freq(make_geometry((2, 1e4, 2048)))


def test_abf_refuses_to_derive_a_base_from_too_short_a_length():
    with pytest.raises(RopeScalingError, match="below one rotation.*Give `rope_theta`"):
        make_method("abf", factor=2).inv_freq(make_geometry((64, 1e4, 6)))
