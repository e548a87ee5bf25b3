"""One notation of methods: text, plain data and objects say the same, in every direction; and lengths as written."""

import dataclasses
import json
import math
import re
from dataclasses import MISSING
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from conftest import make_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rope_scaling import (
    METHODS,
    Alternating,
    AngleClip,
    Linear,
    LmInfinite,
    LogN,
    PRope,
    ReRope,
    Resonance,
    RopeScalingError,
    SlidingWindow,
    Yarn,
    make_method,
)
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.lengths import in_tokens, parse_lengths, tokens, tokens_or_multiple
from rope_scaling.methods import (
    Combination,
    from_dict,
    label,
    make_scaled,
    method_text,
    parse,
    patch_arguments,
    to_dict,
)
from rope_scaling.notation import from_calls
from rope_scaling.spans import SpanMethod


GOLDEN = Path(__file__).parent / "golden"
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


# Round trips --------------------------------------------------------------------------------------------------------

FACTORS = st.floats(1.0, 1e6) | st.integers(1, 512)
POSITIVE = st.floats(1e-3, 1e6)
LISTS = st.lists(POSITIVE, min_size=1, max_size=9).map(tuple)
WINDOWS = st.none() | st.integers(20, 5000)
STATIC = [name for name, cls in METHODS.items() if issubclass(cls, FrequencyMethod)]
# Alternating takes what decides no frequency.
PLAIN_SPANS = ["sliding_window", "lm_infinite", "streaming", "rerope", "self_extend", "string"]
VALUES = {
    "factor": FACTORS,
    "partial_rotary_factor": st.floats(0.0, 1.0),
    "steps": st.lists(st.floats(1.0, 100.0), min_size=1, max_size=5, unique=True).map(
        lambda steps: tuple(sorted(steps))
    ),
    "beta_fast": st.floats(16.0, 64.0),
    "beta_slow": st.floats(0.5, 4.0),
    "high_freq_factor": st.floats(4.0, 9.0),
    "low_freq_factor": st.floats(1.0, 3.0),
    "window": WINDOWS,
    "local_size": st.integers(1, 20),
    "chunk_size": st.integers(50, 200),
    "num_sinks": st.integers(1, 9),
    "layer_kinds": st.none() | st.lists(st.sampled_from(["local", "global"]), min_size=1, max_size=6).map(tuple),
    "max_angles": st.none() | st.lists(POSITIVE | st.just(math.inf), min_size=1, max_size=6).map(tuple),
    "long_factor": LISTS,
}
BY_TYPE = {
    "float": POSITIVE,
    "float | None": st.none() | POSITIVE,
    "int": st.integers(1, 4000),
    "int | None": st.none() | st.integers(1, 4000),
    "bool": st.booleans(),
    "tuple[float, ...] | None": st.none() | LISTS,
}


def methods(names=tuple(METHODS)):
    """Methods of any class, with any of their fields set to something that the class takes."""
    return st.sampled_from(list(names)).flatmap(method)


def method(name):
    cls = METHODS[name]
    fields = {}
    for field in dataclasses.fields(cls):
        if field.type == "FrequencyMethod | None":
            values = st.none() | methods([other for other in STATIC if other != name])
        elif "SpanMethod" in str(field.type):
            values = methods(PLAIN_SPANS)
        else:
            values = VALUES[field.name] if field.name in VALUES else BY_TYPE[str(field.type)]
        fields[field.name] = values
    required = {
        n
        for n in fields
        if any(f.name == n and f.default is MISSING and f.default_factory is MISSING for f in dataclasses.fields(cls))
    }
    optional = {key: value for key, value in fields.items() if key not in required}
    return st.fixed_dictionaries({key: fields[key] for key in required}, optional=optional).map(
        lambda values: made(cls, values)
    )


def made(cls, values):
    try:
        return cls(**values)
    except RopeScalingError:
        assume(False)


def data_of(something):
    """As JSON writes and reads it, and as YAML does."""
    data = to_dict(something)
    text = json.dumps(data, allow_nan=False)
    assert yaml.safe_load(yaml.safe_dump(json.loads(text))) == json.loads(text)
    return json.loads(text)


@pytest.mark.parametrize("name", METHODS)
@FEW
@given(data=st.data())
def test_every_method_is_read_back_from_its_text_and_its_data(name, data):
    one = data.draw(method(name))
    assert parse(str(one)) == one
    assert from_dict(data_of(one)) == one and method_from_record(data_of(one)) == one
    assert type(parse(str(one))) is type(one)


EXTENTS = st.fixed_dictionaries(
    {},
    optional={
        "target_length": st.integers(1, 10**6) | st.sampled_from(["8x", "1.5x"]),
        "original_max_position_embeddings": st.integers(1, 10**6),
        "layer_types": st.just("all") | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1),
    },
)
OPEN = st.sampled_from(
    [("yarn", {}), ("yarn", {"beta_fast": 16}), ("abf", {}), ("dynamic_longrope", {"long_factor": [1.5, 2]})]
) | st.just(("resonance", {"wrapped": "yarn", "beta_fast": 8.0}))


@FEW
@given(parts=st.lists(methods() | OPEN, min_size=1, max_size=4), extent=EXTENTS)
def test_every_combination_is_read_back_from_its_text_and_its_data(parts, extent):
    assume(len(parts) > 1 or extent or isinstance(parts[0], tuple))
    together = Combination(tuple(parts), extent)
    assert parse(str(together)) == together
    assert from_dict(data_of(together)) == together


@FEW
@given(values=st.dictionaries(st.sampled_from(["text", "number"]), st.text(max_size=12)))
def test_custom_methods_with_any_text_are_read_back(values):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(SpanMethod):
        name: ClassVar[str] = "own"
        text: str = "a"
        number: str | float = 1.0

        def spans(self, rope):
            return []

    METHODS["own"] = Own
    try:
        one = Own(**values)
        assert parse(str(one)) == one and from_dict(data_of(one)) == one
        assert parse(f"{one}+log_n") == Combination((one, LogN()))
    finally:
        del METHODS["own"]


# Text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("yarn:factor=4,beta_fast=16,truncate=false", Yarn(factor=4, beta_fast=16, truncate=False)),
        ('yarn:{"factor": 4, "beta_fast": 16}', Yarn(factor=4, beta_fast=16)),
        ("resonance:wrapped=yarn,factor=4", Resonance(wrapped=Yarn(factor=4))),
        ("resonance:wrapped=(yarn:factor=4)", Resonance(wrapped=Yarn(factor=4))),
        ("rerope:window=4k", ReRope(window=4096)),
        ("angle_clip:max_angles=[inf,0.5]", AngleClip(max_angles=(math.inf, 0.5))),
        (
            "alternating:local=(lm_infinite:window=1k),everywhere=rerope,layer_kinds=[local,global]",
            Alternating(local=LmInfinite(window=1024), everywhere=ReRope(), layer_kinds=("local", "global")),
        ),
        ("rerope + log_n", Combination((ReRope(), LogN()))),
        ("yarn:factor=1e+1+log_n", Combination((Yarn(factor=10.0), LogN()))),
        ("yarn", Combination((("yarn", {}),))),
        ("yarn:target_length=32k", Combination((("yarn", {}),), {"target_length": 32768})),
        ("self_extend:factor=8", Combination((make_method("self_extend"),), {"factor": 8})),
    ],
)
def test_forms_of_text(text, wanted):
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "YaRN",
        "Self-Extend",
        "NTK-by-parts",
        "ntk by parts",
        "SelfExtend",
        "LogN",
        "Dynamic-YaRN",
        "p-RoPE",
        "Proportional",
    ],
)
def test_names_in_any_case_and_spelling(name):
    from rope_scaling.methods import method_name

    known = {"YaRN": "yarn", "Dynamic-YaRN": "dynamic_yarn", "p-RoPE": "p_rope", "Proportional": "p_rope"}
    known |= {"Self-Extend": "self_extend", "SelfExtend": "self_extend", "LogN": "log_n"}
    assert method_name(name) == known.get(name, "ntk_by_parts")


def test_no_two_methods_have_names_that_are_spelt_alike():
    from rope_scaling.registry import ALIASES, _letters

    names = [*METHODS, *ALIASES]
    assert len({_letters(name) for name in names}) == len(names)


def test_a_name_in_another_case_gives_the_same_label_as_its_own():
    assert str(parse("YaRN:beta_fast=16 + Log-N")) == "yarn:beta_fast=16+log_n"
    assert label(parse("ABF:rope_theta=1e6")) == "abf:rope_theta=1e+06"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yran:beta_fast=16", "Unknown method 'yran'. Did you mean 'yarn'"),
        ("yarn+", "Unknown method 'yarn+'"),
        ("", "Unknown method ''"),
        ("yarn:beta_fast", "'beta_fast' is not `field=value`"),
        ("yarn:bta_fast=3", "Unknown argument of 'yarn': 'bta_fast'. Did you mean 'beta_fast'?"),
        ("longrope:long_factr=3", "Unknown argument of 'longrope': 'long_factr'. Did you mean 'long_factor'?"),
        ("longrope", "'longrope' needs `long_factor`; got nothing"),
        ("longrope:{long_factor}", "what follows the name is not a JSON object"),
        ("longrope:{long_factor", "brackets are not closed"),
        ('yarn:beta_fast="16', "a quotation mark is not closed"),
        ("self_extend:factor=8+log_n", "Unknown argument of 'self_extend': 'factor'"),
        ("yarn:target_length=0x", "must be a multiple above 0"),
        ("yarn:target_length=256+log_n:target_length=256", "`target_length` is given twice"),
        ("alternating:local=(rerope+log_n)", "`local` takes one method and its fields; got 'rerope+log_n'"),
        ("alternating:local=(yarn)", "'yarn' needs `factor`"),
        ("yarn:original_max_position_embeddings=8x", "must be a whole number of tokens, at least 1; got '8x'"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(RopeScalingError) as refused:
        parse(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "data", [{}, [], 3, None, {"name": 3}, ["yarn", 3], {"methods": []}, {"methods": ["yarn"], "x": 1}]
)
def test_what_is_no_data_of_a_method(data):
    with pytest.raises(RopeScalingError):
        from_dict(data)


def test_data_in_the_forms_of_a_recipe():
    both = Combination((("yarn", {"beta_fast": 16}), LogN()))
    assert from_dict([{"name": "YaRN", "beta_fast": 16}, "log_n"]) == both == parse("yarn:beta_fast=16+log_n")
    with pytest.raises(RopeScalingError, match="`target_length` is given twice"):
        from_dict(["yarn:target_length=256", {"name": "log_n", "target_length": 512}])
    assert from_dict({"name": "rerope", "window": "4k"}) == ReRope(window=4096)
    assert from_dict(yaml.safe_load("{name: abf, rope_theta: 1e6}")) == make_method("abf", rope_theta=1e6)
    wrapped = {"name": "resonance", "wrapped": {"name": "yarn", "factor": 4}}
    assert from_dict(wrapped) == Resonance(wrapped=Yarn(factor=4))


def test_the_documentation_writes_the_same_methods_in_both_forms():
    page = (Path(__file__).parents[1] / "docs" / "notation.md").read_text()
    rows = re.findall(r"^\| [^|`]+ \| `([^`]+)` \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for text, data in rows:
        assert parse(text) == from_dict(yaml.safe_load(data)), text


# Hooks --------------------------------------------------------------------------------------------------------------


def test_one_method_for_two_that_follow_each_other():
    assert Yarn(factor=2).after(Yarn(factor=4, beta_fast=16)) == Yarn(factor=8, beta_fast=16)
    assert Yarn(factor=2, beta_fast=8).after(Yarn(factor=4, beta_fast=16)) == Yarn(factor=8, beta_fast=8)
    lists = make_method("longrope", factor=2, long_factor=[1, 2])
    for later, earlier in ((Yarn(factor=2), Linear(factor=4)), (lists, lists), (PRope(), PRope())):
        assert later.after(earlier) is None


def test_a_custom_method_may_be_one_that_wraps(llama, monkeypatch):
    """What Resonance does is nobody's special case."""
    import rope_scaling

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Halved(FrequencyMethod):
        name: ClassVar[str] = "halved"
        wrapped_field: ClassVar[str] = "below"
        below: FrequencyMethod | None = None

        @property
        def factor(self):
            return getattr(self.below, "factor", None)

        def frequencies(self, geometry):
            inv_freq, attention_factor = self.below.frequencies(geometry)
            return self.on_top(inv_freq), attention_factor

        def on_top(self, inv_freq):
            return inv_freq / 2

    # As the classes of this library have it, whose annotations are text.
    dataclasses.fields(Halved)[0].type = "FrequencyMethod | None"
    monkeypatch.setitem(METHODS, "halved", Halved)
    one = Halved(below=Yarn(factor=4))
    assert parse("halved:below=yarn,factor=4") == parse(str(one)) == from_dict(data_of(one)) == one
    frequencies = rope_scaling.patch(llama, "halved", below="yarn", factor=4).model.rotary_emb.inv_freq.clone()
    assert torch.allclose(2 * frequencies, rope_scaling.patch(llama, "yarn", factor=4).model.rotary_emb.inv_freq)
    scaled = make_model("llama3.1")
    frequencies = rope_scaling.patch(scaled, "halved", below="yarn", factor=4).model.rotary_emb.inv_freq.clone()
    assert torch.allclose(2 * frequencies, rope_scaling.patch(scaled, "yarn", factor=4).model.rotary_emb.inv_freq)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_class_says_of_itself_exists(name):
    cls = METHODS[name]
    known = {field.name for field in dataclasses.fields(cls)}
    assert issubclass(METHODS[cls.nearest_static], FrequencyMethod)
    assert {cls.wrapped_field} - {""} <= known and cls.sweep_fields(8.0).keys() <= known


# Unknown before missing ---------------------------------------------------------------------------------------------


def test_unknown_fields_are_named_before_missing_ones(llama):
    import rope_scaling

    for call in (make_method, lambda name, **fields: make_scaled(name, None, fields)):
        with pytest.raises(RopeScalingError, match="Unknown argument of 'yarn': 'bta_fast'. Did you mean 'beta_fast'"):
            call("yarn", bta_fast=16)
    with pytest.raises(RopeScalingError, match="Unknown argument of 'yarn': 'bta_fast'"):
        rope_scaling.patch(llama, "yarn", bta_fast=16)
    with pytest.raises(RopeScalingError, match="Unknown argument of 'yarn': 'bta_fast'"):
        rope_scaling.patch(llama, "resonance", wrapped="yarn", bta_fast=16)
    with pytest.raises(RopeScalingError, match="Unknown argument of 'longrope': 'fctor'"):
        rope_scaling.patch(llama, "longrope", fctor=4)


# What goes to `patch` -----------------------------------------------------------------------------------------------


def test_an_extent_goes_to_patch_once():
    assert patch_arguments(parse("yarn"), factor=4) == ((("yarn", {}),), {"factor": 4})
    assert patch_arguments(parse("yarn"), target_length="8x") == ((("yarn", {}),), {"factor": 8.0})
    assert patch_arguments(parse("yarn:factor=4")) == ((Yarn(factor=4),), {"factor": 4})
    assert patch_arguments(parse("yarn:factor=4+log_n")) == ((Yarn(factor=4), LogN()), {})
    assert patch_arguments(parse("abf:rope_theta=1e6"), factor=4)[0] == (("abf", {"rope_theta": 1e6}),)
    for text, beside in (("yarn:factor=2", {"target_length": 256}), ("rerope:target_length=256", {"factor": 2})):
        with pytest.raises(RopeScalingError, match=f"'{text}' sets `.*`, and `.*` is given beside it"):
            patch_arguments(parse(text), **beside)
    with pytest.raises(RopeScalingError, match="Give `factor` or `target_length`, not both"):
        patch_arguments(parse("yarn"), factor=2, target_length="2x")


# Lengths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("32768", 32768), ("32k", 32768), ("32K", 32768), (" 1m ", 2**20), ("1.5k", 1536), ("1e4", 10000), (512, 512)],
)
def test_tokens(text, wanted):
    assert tokens("length", text) == tokens_or_multiple("length", text) == in_tokens("length", text, 64) == wanted


def test_multiples():
    assert tokens_or_multiple("length", "8X") == "8x" and tokens_or_multiple("length", "1.50x") == "1.5x"
    assert in_tokens("length", "8x", 64) == 512 and in_tokens("length", "1.5x", 64) == 96
    assert parse_lengths(["1x", "0.5x", "32k", 16], 64) == [64, 32, 32768, 16]


@pytest.mark.parametrize(
    "text", ["8y", "k", "x", "", "-1", "0", "0.3", "nan", "inf", "infx", "1.00001k", None, True, "9" * 400]
)
def test_what_is_no_length(text):
    for read in (tokens, tokens_or_multiple, lambda name, value: in_tokens(name, value, 64)):
        with pytest.raises(RopeScalingError, match="`length`"):
            read("length", text)
    with pytest.raises(RopeScalingError, match="`lengths` takes numbers of tokens such as '32k', or multiples"):
        parse_lengths([text], 64)


# What earlier versions wrote ----------------------------------------------------------------------------------------

RECORDS = json.loads((GOLDEN / "format_2" / "records.json").read_text())


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("yarn(factor=4, beta_fast=16)", "yarn:factor=4,beta_fast=16"),
        ("self_extend(group_size=4) + log_n()", "self_extend:group_size=4 + log_n"),
        ("resonance(wrapped=yarn(factor=2))", "resonance:wrapped=(yarn:factor=2)"),
        (
            "alternating(local=rerope(), everywhere=rerope(window=9))",
            "alternating:local=(rerope),everywhere=(rerope:window=9)",
        ),
        ("longrope(factor=8, long_factor=<32 numbers>)", "longrope:factor=8,long_factor=<32 values>"),
        ("not patched; loaded with llama3(factor=8)", "not patched; loaded with llama3:factor=8"),
        ("not patched", "not patched"),
    ],
)
def test_rows_of_earlier_versions_are_read_in_the_notation(before, now):
    assert from_calls(before) == now == from_calls(now)
    if "<" not in now and "not" not in now:
        assert method_text_of(parse(now)) == now


def method_text_of(methods):
    return " + ".join(map(method_text, methods.methods if isinstance(methods, Combination) else [methods]))


def test_a_run_of_before_and_one_of_now_say_the_same_of_a_method(tmp_path):
    from rope_scaling.eval.files import read_rows

    lines = [{"in_effect": text, "method": "yarn"} for text in ("yarn(factor=4)", "yarn:factor=4")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"method": "costs"}])))
    assert read_rows(tmp_path / "rows.jsonl") == [lines[1], lines[1], {"method": "costs"}]


@pytest.mark.parametrize("case", RECORDS)
def test_records_of_format_2_are_read(case):
    record = check_record(RECORDS[case])
    assert record["format"] == 3 and check_record(record) is record
    methods = [method_from_record(one) for one in record["methods"]]
    assert [method_from_record(to_dict(one)) for one in methods] == methods
    if case == "angle_clip-pairs":
        assert methods == [AngleClip(max_angles=(math.inf, 0.0, *[2.0] * 6))]
    if case == "yarn+window+llama4":
        assert methods[:2] == [Yarn(factor=2.0), SlidingWindow(window=50, num_sinks=4)]
