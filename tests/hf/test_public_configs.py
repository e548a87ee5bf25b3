"""Public checkpoints: the doctor is silent where their configs are right and names what is wrong where they are not;
patches start from what Transformers computes from them.
"""

import json

import pytest
import torch
import transformers
from conftest import close, logits, make_model, rotary
from public_configs import HUNYUAN, RIGHT, SCOUT, SIZES, WRONG
from transformers import AutoConfig, AutoModelForCausalLM

import rope_scaling
from references import formulas
from rope_scaling import RopeScalingError, diagnose
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.loading import load_skeleton


WITHOUT_ROPE = {"mpt-7b", "gpt2", "bert-base", "musicgen-small"}


def folder(path, config, **files):
    files = {"config": {**SIZES, **config}, **files}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


def codes(diagnosis):
    return {finding.code for finding in diagnosis.findings if finding.level != "note"}


@pytest.mark.parametrize("name", RIGHT)
def test_the_doctor_is_silent_where_a_config_is_right(name, tmp_path):
    if RIGHT[name]["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("this Transformers does not have the family")
    diagnosis = diagnose(folder(tmp_path, RIGHT[name]))
    assert codes(diagnosis) == set(), str(diagnosis)
    assert (diagnosis.description is None) == (name in WITHOUT_ROPE)


@pytest.mark.parametrize("name", WRONG)
def test_the_doctor_names_what_is_wrong_and_the_line_that_fixes_it(name, tmp_path):
    config, expected, said = WRONG[name]
    tokenizer = {"tokenizer_config": {"model_max_length": 32768}} if "Alpaca" in name else {}
    diagnosis = diagnose(folder(tmp_path, config, **tokenizer))
    assert codes(diagnosis) == expected, str(diagnosis)
    assert said in str(diagnosis)


def test_the_advised_patches_count_from_the_trained_length():
    """As the findings for Qwen2.5-1M, nomic-embed, LongAlpaca and Command R say, at a hundredth of their lengths."""
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    for method, changes, arguments, reach, target in [
        ("dual_chunk", {"max_position_embeddings": 1010}, {"target_length": 1010}, 262, 1010),
        ("ntk", {"max_position_embeddings": 1010}, {"target_length": 1010}, 262, 1010),
        ("linear", {"max_position_embeddings": 262, "rope_parameters": linear}, {"factor": 2}, 2096, 4192),
        ("yarn", {"max_position_embeddings": 64}, {"factor": 2}, 262, 524),
    ]:
        model = make_model("llama", **changes)
        rope_scaling.patch(model, method, original_max_position_embeddings=262, **arguments)
        (slot,) = read_description(model).slots
        assert (slot.original_length, slot.reach, slot.target_length) == (262, reach, target)


def made(config, path):
    """A random model of a config, as plain Transformers reads it, and its logits past any window or trained length."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder(path, config)))
    return model.eval()


def hunyuan_base(width):
    return 10000.0 * 1000.0 ** (width / (width - 2))


def test_hunyuans_fixed_alpha_is_a_base_to_extend_from(tmp_path):
    model = made(HUNYUAN, tmp_path)
    before = logits(model)
    unscaled = torch.tensor([hunyuan_base(32) ** (-i / 16) for i in range(16)])
    assert torch.allclose(rotary(model).inv_freq, unscaled, rtol=1e-6)
    assert read_description(model).slots[0].reach == 32768

    rope_scaling.patch(model, "yarn", factor=2)
    wanted, factor = formulas.yarn(32, hunyuan_base(32), 32768, 2)
    assert torch.allclose(rotary(model).inv_freq, torch.tensor(wanted), rtol=1e-6)
    assert rotary(model).attention_scaling == pytest.approx(factor)
    assert "alpha" not in model.config.rope_parameters
    model.save_pretrained(tmp_path / "patched")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert close(logits(plain), logits(model)) and not close(logits(plain), before)
    assert torch.equal(logits(rope_scaling.unpatch(model)), before)
    assert model.config.rope_parameters["alpha"] == 1000.0
    assert torch.equal(logits(rope_scaling.unpatch(rope_scaling.patch(model, "self_extend", group_size=4))), before)


@pytest.mark.parametrize("target", ["transformers-v4", "vllm", "sglang", "llama.cpp"])
def test_servers_read_hunyuans_base(target, tmp_path):
    assert codes(diagnose(folder(tmp_path, HUNYUAN), targets=target)) == set()
    overrides = rope_scaling.config_overrides(made(HUNYUAN, tmp_path), target)
    assert overrides["rope_theta"] == pytest.approx(hunyuan_base(32))
    assert overrides["rope_parameters"]["rope_type"] == "default" and "alpha" not in overrides["rope_parameters"]


def test_what_a_length_dependent_model_is_told_to_load_keeps_its_other_parameters(tmp_path):
    """The logits within the trained length are the same when it is loaded as the error says."""
    config = {
        **{"model_type": "stablelm", "max_position_embeddings": 256, "rope_theta": 5e5, "partial_rotary_factor": 0.25},
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    model = made(config, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match="depend on the length of the call") as refused:
        rope_scaling.patch(model, "yarn", factor=2)
    advised = json.loads(str(refused.value).partition("rope_parameters=")[2].rpartition(")")[0])
    again = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=advised).eval()
    assert torch.equal(logits(again), logits(model))
    rope_scaling.patch(again, "yarn", factor=2)


def test_llama_4_scouts_equal_factors_are_a_step(tmp_path):
    path = folder(tmp_path, SCOUT)
    slot = read_description(load_skeleton(path)).slots[0]
    wanted, _ = formulas.llama3(32, 5e5, 8192, 16, 1, 1)
    assert torch.allclose(slot.inv_freq, torch.tensor(wanted), rtol=1e-6)
    assert slot.method == "not patched; loaded with llama3:factor=16,high_freq_factor=1"
    model = made(SCOUT, tmp_path)
    rope_scaling.patch(model, "llama3", factor=2)
    wanted, _ = formulas.llama3(32, 5e5, 8192, 32, 1, 1)
    assert torch.allclose(rotary(model).inv_freq, torch.tensor(wanted), rtol=1e-6)
    before = rotary(rope_scaling.unpatch(model)).inv_freq.clone()
    rope_scaling.patch(model, "yarn", factor=2)
    slowed = rotary(model).inv_freq / before
    assert (slowed < 0.85).any() and (slowed < 1 + 1e-6).all()
    rope_scaling.patch(model, "angle_clip")


@pytest.mark.parametrize(
    ("method", "arguments"), [("linear", {"factor": 4}), ("ntk", {"factor": 4}), ("abf", {"rope_theta": 5e6})]
)
def test_gemma_4s_share_of_pairs_takes_another_base_and_factor(method, arguments, tmp_path):
    model = made(RIGHT["gemma-4"], tmp_path)
    before, logits_before = rotary(model).full_attention_inv_freq.clone(), logits(model)
    rope_scaling.patch(model, method, **arguments)
    after = rotary(model).full_attention_inv_freq
    rotated = before > 0
    base = {"ntk": 1e6 * 4 ** (64 / 62), "abf": 5e6}.get(method, 1e6)
    wanted = torch.tensor([base ** (-i / 32) / (4 if method == "linear" else 1) for i in range(32)])
    assert torch.allclose(after[rotated], wanted[rotated], rtol=1e-6) and not after[~rotated].any()
    model.save_pretrained(tmp_path / "patched")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert close(logits(plain), logits(model)) and not close(logits(plain), logits_before)
    assert torch.equal(logits(rope_scaling.unpatch(model)), logits_before)


def test_what_gemma_4_cannot_express_is_refused_in_a_few_words(tmp_path):
    with pytest.raises(RopeScalingError, match="Use 'linear', 'ntk' or 'abf', or a span method") as refused:
        rope_scaling.patch(made(RIGHT["gemma-4"], tmp_path), "yarn", factor=2)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", [None, "ntk", "su", "deepseek_yarn", "mine", ["yarn"]])
def test_types_that_transformers_does_not_have_are_one_line_everywhere(kind, tmp_path):
    settings = {"type": kind, "factor": 2.0, "original_max_position_embeddings": 2048}
    path = folder(tmp_path, {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": settings})
    diagnosis = diagnose(path)
    assert [finding.code for finding in diagnosis.findings if finding.level == "error"] == ["RS105"]
    with pytest.raises(RopeScalingError, match="`rope_type` .* is not a type that Transformers computes"):
        load_skeleton(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DeepSeek-V3", {"n_routed_experts": 2**12, "moe_intermediate_size": 2**21}),
        ("Llama-4-Scout-17B-16E", {"num_local_experts": 2**12, "intermediate_size": 2**21}),
    ],
)
def test_a_model_that_is_larger_than_the_memory_is_described_and_diagnosed(name, changes, tmp_path):
    """A layer of its experts would take terabytes."""
    path = folder(tmp_path, {**RIGHT[name], **changes})
    assert read_description(load_skeleton(path)).slots[0].method.startswith("not patched; loaded with")
    diagnosis = diagnose(path)
    assert codes(diagnosis) == set() and diagnosis.description is not None
