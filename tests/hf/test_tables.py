"""RoFormer, GPT-J and CodeGen keep their angles in tables: a patch computes them anew, and longer."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import logits, token_ids
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    CodeGenConfig,
    DynamicCache,
    GPTJConfig,
    RoFormerConfig,
)

import rope_scaling
from references import formulas
from rope_scaling import Linear, RopeScalingError, SelfExtend
from rope_scaling.hf.compat import CACHE_NAME


TRAINED, WIDTH = 64, 16


def make(masked=False):
    torch.manual_seed(0)
    config = RoFormerConfig(
        **{"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 96, "max_position_embeddings": TRAINED, "initializer_range": 0.15},
        is_decoder=not masked,
    )
    return (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_config(config).eval()


def table(model):
    return model.roformer.encoder.embed_positions.weight


@pytest.mark.parametrize("masked", [False, True])
def test_twice_as_far_is_the_old_table_at_half_the_pace(masked):
    model = make(masked)
    before, short = table(model).clone(), token_ids(TRAINED)
    plain = logits(model, short)
    rope_scaling.patch(model, "linear", factor=2)
    assert table(model).shape == (2 * TRAINED, WIDTH) and model.config.max_position_embeddings == 2 * TRAINED
    assert torch.allclose(table(model)[::2], before, atol=1e-6)
    assert logits(model, token_ids(2 * TRAINED)).isfinite().all()
    rope_scaling.unpatch(model)
    assert torch.equal(logits(model, short), plain) and torch.equal(table(model), before)
    assert not hasattr(model.config, "rope_parameters") and model.config.max_position_embeddings == TRAINED


def test_frequencies_and_attention_factor_against_the_formula():
    model = rope_scaling.patch(make(), "yarn", factor=4)
    inv_freq, attention_factor = formulas.yarn(WIDTH, 10000.0, TRAINED, 4.0)
    angles = np.arange(4 * TRAINED)[:, None] * np.array(inv_freq)
    wanted = attention_factor * np.concatenate([np.sin(angles), np.cos(angles)], 1)
    assert np.allclose(table(model).numpy(), wanted, atol=1e-5)
    slot = rope_scaling.describe(model).slots[0]
    assert slot.target_length == 4 * TRAINED and slot.attention_factor == pytest.approx(attention_factor)


def test_saved_and_loaded_without_the_library(tmp_path):
    model = rope_scaling.patch(make(), "ntk", factor=4)
    far = token_ids(3 * TRAINED)
    wanted = logits(model, far)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, far), wanted)
    assert torch.equal(logits(rope_scaling.patch(plain), far), wanted)
    assert rope_scaling.diagnose(str(tmp_path)).healthy and rope_scaling.diagnose(plain).healthy
    assert torch.allclose(table(rope_scaling.unpatch(plain)), table(make()), atol=1e-6)
    assert "saved with ntk" in str(rope_scaling.describe(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_moved_while_patched():
    model = make()
    before = table(model).clone()
    rope_scaling.patch(model, "yarn", factor=2).to(torch.bfloat16)
    assert table(rope_scaling.unpatch(model)).equal(before)


def test_attention_is_out_of_reach():
    model = make()
    before = logits(model, token_ids(TRAINED))
    with pytest.raises(RopeScalingError, match="does not go through Transformers' attention interface"):
        rope_scaling.patch(model, "self_extend")
    assert torch.equal(logits(model, token_ids(TRAINED)), before)


CODED = {"gptj": GPTJConfig, "codegen": CodeGenConfig}
"""Families that save no table, and compute it from the length alone: no config can scale it."""
ROTARY = 8


@pytest.fixture(params=CODED)
def coded(request):
    torch.manual_seed(0)
    config = CODED[request.param](
        **{"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TRAINED, "rotary_dim": ROTARY},
        **{"initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2},
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tables(model):
    """One for every layer; from Transformers 5.24 on, one for all."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]


def test_every_layer_gets_the_table_of_the_formula(coded):
    before, short = [table.clone() for table in tables(coded)], token_ids(TRAINED)
    plain = logits(coded, short)
    rope_scaling.patch(coded, "yarn", factor=4)
    inv_freq, attention_factor = formulas.yarn(ROTARY, 10000.0, TRAINED, 4.0)
    angles = np.arange(4 * TRAINED)[:, None] * np.array(inv_freq)
    wanted = attention_factor * np.concatenate([np.sin(angles), np.cos(angles)], 1)
    for table in tables(coded):
        assert np.allclose(table.numpy(), wanted, atol=1e-5)
    assert logits(coded, token_ids(4 * TRAINED)).isfinite().all() and coded.config.n_positions == 4 * TRAINED
    assert "plain Transformers refuses it" in str(rope_scaling.describe(coded))
    rope_scaling.unpatch(coded)
    assert torch.equal(logits(coded, short), plain) and coded.config.n_positions == TRAINED
    assert all(torch.equal(table, old) for table, old in zip(tables(coded), before, strict=True))


@pytest.mark.parametrize("method", ["linear", "ntk", "mrrope_pro"])
def test_a_saved_one_is_refused_by_plain_transformers_and_restored(method, coded, tmp_path):
    activation, far = coded.config.activation_function, token_ids(3 * TRAINED)
    rope_scaling.patch(coded, method, factor=4)
    wanted = logits(coded, far)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        coded.save_pretrained(folder)
        with pytest.raises(KeyError, match=r"load it with rope_scaling\.from_pretrained"):
            AutoModelForCausalLM.from_pretrained(folder)
        assert rope_scaling.diagnose(str(folder)).healthy, str(rope_scaling.diagnose(str(folder)))
        coded = rope_scaling.from_pretrained(folder)
        assert torch.equal(logits(coded, far), wanted) and rope_scaling.diagnose(coded).healthy
    for again in (copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert torch.equal(logits(again, far), wanted)
    rope_scaling.unpatch(coded).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.activation_function == activation and plain.config.n_positions == TRAINED
    assert torch.equal(tables(plain)[-1], tables(coded)[-1])


def test_an_adapter_brings_the_scaling_along(coded, tmp_path):
    base = copy.deepcopy(coded)
    model = get_peft_model(rope_scaling.patch(coded, "yarn", factor=4), LoraConfig(target_modules=["fc_in"]))
    rope_scaling.record_adapter(model)
    model.save_pretrained(tmp_path)
    again = rope_scaling.load_adapter(tmp_path, base)
    assert torch.equal(logits(again, token_ids(3 * TRAINED)), logits(model, token_ids(3 * TRAINED)))


@pytest.mark.parametrize("target", ["transformers", "vllm", "llama.cpp"])
def test_no_config_tells_a_server_of_it(target, coded):
    with pytest.raises(RopeScalingError, match=r"hard-codes its rotary frequencies.*rope_scaling\.from_pretrained"):
        rope_scaling.config_overrides(rope_scaling.patch(coded, "yarn", factor=4), target)


def test_spans_need_a_table_that_is_long_enough(coded, tmp_path):
    far, short = token_ids(3 * TRAINED), token_ids(TRAINED)
    plain = logits(coded, short)
    if len(tables(coded)) > 1:  # before Transformers 5.24
        with pytest.raises(RopeScalingError, match="does not go through Transformers' attention interface"):
            rope_scaling.patch(coded, "self_extend", target_length=4 * TRAINED)
        return
    with pytest.raises(RopeScalingError, match=r"a precomputed table of 64 positions\. Pass `target_length=128`"):
        rope_scaling.patch(coded, "self_extend")
    rope_scaling.patch(coded, "self_extend", target_length=4 * TRAINED)
    wanted = logits(coded, far)
    with torch.no_grad():
        cache, steps = DynamicCache(config=coded.config), []
        for piece in far.split(50, dim=1):
            steps.append(coded(piece, **{CACHE_NAME: cache}).logits)
    assert torch.allclose(torch.cat(steps, 1), wanted, atol=1e-4)
    coded.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match=r"load it with rope_scaling\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(rope_scaling.from_pretrained(tmp_path), far), wanted)
    assert torch.equal(logits(rope_scaling.unpatch(coded), short), plain)
    rope_scaling.patch(coded, Linear(factor=4), SelfExtend(group_size=1, window=TRAINED))
    scaled = logits(coded, far)
    assert torch.allclose(logits(rope_scaling.patch(coded, "linear", factor=4), far), scaled, atol=1e-4)


def test_in_half_precision(coded):
    coded.to(torch.bfloat16)
    before = logits(coded, token_ids(TRAINED))
    rope_scaling.patch(coded, "linear", factor=2)
    assert tables(coded)[0].dtype == torch.bfloat16 and logits(coded, token_ids(2 * TRAINED)).isfinite().all()
    assert torch.equal(logits(rope_scaling.unpatch(coded), token_ids(TRAINED)), before)
