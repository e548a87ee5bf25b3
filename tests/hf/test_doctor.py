"""Every ailment, planted: the doctor names it by its code, and says nothing of a healthy checkpoint."""

import ast
import json
from pathlib import Path

import pytest
import torch
from conftest import make_model, rotary
from transformers import AttentionInterface

import rope_scaling
from rope_scaling import RopeScalingError, diagnose
from rope_scaling.cli.main import main
from rope_scaling.doctor import CODES


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


def folder(path, config, **files):
    """A checkpoint without weights, as files."""
    for name, content in {"config": config, **files}.items():
        if content is not None:
            (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def codes(diagnosis, notes=False):
    return {finding.code for finding in diagnosis.findings if notes or finding.level != "note"}


PLANTED = {
    # name: (changes of the config, codes beside notes)
    "base lost": ({"rope_theta": None, "rope_scaling": YARN}, {"RS101"}),
    "base lost, new form": ({"rope_theta": None, "rope_parameters": LLAMA3}, {"RS101"}),
    "original length lost": ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, {"RS102"}),
    "length not raised": ({"max_position_embeddings": 64, "rope_scaling": YARN}, {"RS103"}),
    "original length is the extended one": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 256}},
        {"RS103"},
    ),
    "contradicting factor": ({"rope_scaling": {**YARN, "factor": 8.0}}, {"RS103"}),
    "llama3 that scales from its own length": ({"max_position_embeddings": 64, "rope_scaling": LLAMA3}, {"RS103"}),
    "forms disagree": ({"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}}, {"RS104"}),
    "bases disagree": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"RS104"}),
    "private type": ({"rope_scaling": {"rope_type": "my_method", "factor": 2.0}}, {"RS105"}),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, {"RS106"}),
    "attn_factor": ({"rope_scaling": {**YARN, "attn_factor": 1.2}}, {"RS107"}),
    "misspelt": ({"rope_scaling": {**YARN, "beta_fst": 16}}, {"RS107"}),
    "no type": ({"rope_scaling": {"factor": 4.0}}, {"RS107"}),
    "left over": ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, {"RS107"}),
    "two sets": ({"rope_scaling": {**LONGROPE, "factor": 4.0}}, {"RS109"}),
    "no length": (
        {"max_position_embeddings": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"RS113"},
    ),
    "small factor": ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, {"RS110"}),
    "text for a number": ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, {"RS110"}),
    "not a number": ({"rope_scaling": {**YARN, "factor": float("nan")}}, {"RS110"}),
    "no base at all": ({"rope_theta": -1.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"RS110"}),
    "a factor that is missing": ({"rope_scaling": without(YARN, "factor")}, {"RS110", "RS114"}),
    "crossed factors": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, {"RS110"}),
    "factors that are no numbers": ({"rope_scaling": {**LONGROPE, "long_factor": ["a"] * 8}}, {"RS110", "RS109"}),
    "length with a fraction": ({"max_position_embeddings": 256.5, "rope_scaling": YARN}, {"RS110", "RS114"}),
    "unequal lists": ({"rope_scaling": {**LONGROPE, "factor": 4.0, "long_factor": [4.0] * 7}}, {"RS109", "RS110"}),
    "another name of the length": ({"model_max_length": 1024}, {"RS115"}),
    "length before the scaling": (
        {"max_sequence_length": 1024, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"RS115"},
    ),
    "ignored attention": ({"dual_chunk_attention_config": {"chunk_size": 64}}, {"RS116"}),
    "kind of model": ({"model_type": "nothing-like-it"}, {"RS114"}),
    "flat settings for layer types": (
        {**GEMMA3, "rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"RS108"},
    ),
    "nested truncate": (
        {**GEMMA3, "rope_theta": None, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {**YARN, "rope_theta": 1e6, "truncate": False},
        }},
        {"RS107"},
    ),
    "healthy": ({}, set()),
    "healthy yarn": ({"rope_scaling": {**YARN, "rope_theta": 500000.0}}, set()),
    "healthy old form": ({"rope_scaling": {**without(LLAMA3, "rope_type"), "type": "llama3"}}, set()),
    "healthy partial": ({"model_type": "phi", "partial_rotary_factor": 0.5}, set()),
    "healthy window": ({**GEMMA3, "rope_theta": None, "sliding_window": 32}, set()),
    "healthy window, everywhere": ({"model_type": "mistral", "sliding_window": 32, "rope_scaling": YARN}, set()),
    "healthy lengths": ({"model_max_length": 256, "max_sequence_length": 128}, set()),
    "healthy defaults": ({"rope_scaling": {**YARN, "attn_factor": 1, "finetuned": True}}, set()),
    "healthy type": ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, set()),
    "healthy nothing": ({"rope_scaling": {}}, set()),
    "healthy version": (
        {"rope_theta": None, "transformers_version": "4.31.0", "rope_scaling": YARN},
        set(),
    ),
}  # fmt: skip

REFUSED_BY_OLDER = {"flat settings for layer types"}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_settings(name, tmp_path):
    changes, expected = PLANTED[name]
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    diagnosis = diagnose(folder(tmp_path, config))
    if name in REFUSED_BY_OLDER and "RS114" in codes(diagnosis):
        pytest.skip("this Transformers refuses the config")
    assert codes(diagnosis) == expected, str(diagnosis)
    for finding in diagnosis.findings:
        assert finding.cause.endswith((".", "?")) or finding.code == "RS114"
        assert finding.fix.endswith(".") and str(finding) in str(diagnosis)


def test_files_beside_the_config(tmp_path):
    config = {**LLAMA, "rope_scaling": YARN}
    path = folder(tmp_path, config, tokenizer_config={"model_max_length": 64}, generation_config={"max_length": 128})
    assert codes(diagnose(path)) == {"RS205", "RS206"}
    assert codes(diagnose(path, target_length=64)) == set()
    folder(tmp_path, config, tokenizer_config={"model_max_length": 1e30}, generation_config={"max_length": 20})
    assert codes(diagnose(path)) == set()


def test_a_window_is_a_note_until_more_than_the_stated_length_is_asked_for(tmp_path):
    path = folder(tmp_path, {**LLAMA, "model_type": "mistral", "sliding_window": 32})
    assert codes(diagnose(path), notes=True) == {"RS111"} and codes(diagnose(path, target_length=512)) == {"RS111"}


def test_the_tokenizer_says_whether_linear_scales_from_the_stated_length(tmp_path):
    """LongAlpaca states the trained length, DeepSeek-Coder the extended one."""
    config = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    path = folder(tmp_path, config, tokenizer_config={"model_max_length": 1024})
    (finding,) = [finding for finding in diagnose(path).findings if finding.level != "note"]
    assert finding.code == "RS115" and "1024, which is 256 times 4" in finding.cause
    folder(tmp_path, config, tokenizer_config={"model_max_length": 256})
    assert codes(diagnose(path)) == set()
    folder(tmp_path, LLAMA, tokenizer_config={"model_max_length": 1024})
    assert codes(diagnose(path)) == set()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": "linear"}, "Field 'rope_parameters' with value 'linear'"),
        ({"max_position_embeddings": "256"}, "Field 'max_position_embeddings' expected int, got str"),
        ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [4.0] * 7}}, "must have length 8, got 7"),
    ],
)
def test_a_refusal_names_the_value_and_gives_no_advice_on_downloads(changes, said, tmp_path):
    (finding,) = [one for one in diagnose(folder(tmp_path, {**LLAMA, **changes})).findings if one.code == "RS114"]
    assert said in finding.cause and "download" not in finding.cause


def test_notes(tmp_path):
    path = folder(tmp_path, {**LLAMA, "rope_scaling": YARN})
    assert codes(diagnose(path), notes=True) == {"RS112"} and diagnose(path).healthy


def test_adapters(tmp_path, llama):
    (tmp_path / "bare").mkdir()
    (tmp_path / "own").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    bare = folder(tmp_path / "bare", None, adapter_config=adapter)
    assert codes(diagnose(bare)) == {"RS204"}
    record = rope_scaling.patch(llama, "yarn", factor=4).config.rope_scaling_patch
    own = folder(tmp_path / "own", None, adapter_config={**adapter, "rope_scaling_patch": record})
    assert codes(diagnose(own), notes=True) == set()
    folder(tmp_path / "own", None, adapter_config={**adapter, "rope_scaling_patch": {"format": 2}})
    assert codes(diagnose(own)) == {"RS202"}


def test_records(tmp_path, llama):
    for one in ("frequencies", "spans"):
        (tmp_path / one).mkdir()
    rope_scaling.patch(llama, "ntk", factor=4).save_pretrained(tmp_path / "frequencies")
    healthy = diagnose(str(tmp_path / "frequencies"))
    assert codes(healthy) == set() and "ntk:factor=4" in str(healthy)
    edited = json.loads((tmp_path / "frequencies" / "config.json").read_text())
    edited["rope_parameters"]["rope_theta"] = 7.0
    assert codes(diagnose(folder(tmp_path / "frequencies", edited))) == {"RS203"}
    edited["rope_scaling_patch"] = "yarn"
    assert codes(diagnose(folder(tmp_path / "frequencies", edited))) == {"RS202"}
    rope_scaling.patch(llama, "self_extend", group_size=4).save_pretrained(tmp_path / "spans")
    assert codes(diagnose(str(tmp_path / "spans")), notes=True) == {"RS201", "RS303"}
    assert codes(diagnose(str(tmp_path / "spans"), targets="vllm")) == {"RS303"}


@pytest.mark.parametrize(
    ("target", "changes", "expected"),
    [
        ("transformers-v4", {"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 5e5}}, {"RS301"}),
        ("transformers-v4", {"rope_scaling": YARN}, set()),
        ("sglang", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"RS301"}),
        ("vllm", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"RS302"}),
        ("vllm", {"rope_scaling": {**YARN, "attention_factor": 1.0}}, {"RS302"}),
        ("llama.cpp", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, set()),
        ("llama.cpp", {"rope_scaling": {**LONGROPE, "short_factor": [4.0] * 8, "factor": 4.0}}, {"RS303"}),
        ("vllm", {"rope_scaling": LLAMA3}, set()),
    ],
)
def test_what_servers_read(target, changes, expected, tmp_path):
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    diagnosis = diagnose(folder(tmp_path, config), targets=target)
    assert codes(diagnosis) == expected, str(diagnosis)


@pytest.mark.parametrize("case", ["yarn", "mrrope_pro", "linear"])
@pytest.mark.parametrize("target", ["transformers-v4", "vllm", "sglang"])
def test_exports_are_healthy(target, case, tmp_path):
    rope_scaling.export(rope_scaling.patch(make_model("llama"), case, factor=4), tmp_path / "out", target)
    assert codes(diagnose(str(tmp_path / "out"), targets=target)) == set()


def test_running_models(llama):
    assert diagnose(llama).healthy and diagnose(rope_scaling.patch(llama, "yarn", factor=4)).healthy
    llama.config.rope_parameters["factor"] = 2.0
    rotary(llama).inv_freq.mul_(0.5)
    assert "RS401" in codes(diagnose(llama))
    edited = make_model("llama")
    edited.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert codes(diagnose(edited)) == {"RS401"}
    assert codes(diagnose(make_model("llama").half())) == {"RS403"}
    empty = make_model("llama")
    rotary(empty).inv_freq.fill_(torch.nan)
    assert codes(diagnose(empty)) == {"RS402"}


def test_attention_of_running_models():
    AttentionInterface.register("masked_by_nobody", AttentionInterface._global_mapping["sdpa"])
    llama = make_model("llama")
    llama.set_attn_implementation("masked_by_nobody")
    assert codes(diagnose(llama)) == {"RS404"}
    eager = make_model("llama", max_position_embeddings=8192)
    eager.set_attn_implementation("eager")
    assert codes(diagnose(eager), notes=True) == {"RS406"}
    spans = rope_scaling.patch(make_model("llama"), "rerope")
    assert diagnose(spans).healthy
    spans.set_attn_implementation("sdpa")
    assert codes(diagnose(spans)) == {"RS405"}
    for module in spans.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    assert codes(diagnose(spans)) == {"RS405"}


def test_the_page_lists_every_code():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for code, (level, title) in CODES.items():
        assert f"| {code} | {level} | {title} |" in page
    assert page.count("| RS") == len(CODES)


def test_every_code_is_planted():
    """In the table above, or in an assertion of the tests beside this file."""
    trees = [ast.parse(file.read_text()) for file in Path(__file__).parent.glob("test_*.py")]
    asserted = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    named = {one.value for node in asserted for one in ast.walk(node) if isinstance(one, ast.Constant)}
    planted = set().union(*(codes for _, codes, *_ in PLANTED.values()))
    assert set(CODES) <= planted | {name for name in named if isinstance(name, str)}


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("no/such/folder", {}, "no model folder"),
        ("here", {}, "no `config.json`"),
        ("here", {"config": "[]"}, "must hold a mapping"),
        ("here", {"config": "{"}, "not valid JSON"),
        ("here", {"config": "[" * 100_000}, "not valid JSON"),
    ],
)
def test_what_cannot_be_read(name, files, message, tmp_path):
    for file, content in files.items():
        (tmp_path / f"{file}.json").write_text(content)
    with pytest.raises(RopeScalingError, match=message):
        diagnose(str(tmp_path) if name == "here" else name)


def test_bad_arguments():
    with pytest.raises(RopeScalingError, match="Did you mean 'vllm'"):
        diagnose("demo", targets="vlm")
    with pytest.raises(RopeScalingError, match="whole number of tokens"):
        diagnose("demo", target_length=-1)


def test_command(tmp_path, capsys):
    path = folder(tmp_path, {**LLAMA, "rope_scaling": {**YARN, "attn_factor": 1.2}})
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", path])
    printed = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 1
    assert "RS107 warning keys that are ignored" in printed and "is called `attention_factor`" in printed
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", path, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 1 and {row["code"] for row in rows} > {"RS107"}
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "demo"])
    assert stopped.value.code == 0 and "Nothing found." in capsys.readouterr().out
