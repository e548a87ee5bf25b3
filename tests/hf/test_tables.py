"""RoFormer keeps its angles in a table that is saved with the weights: a patch computes it anew, and longer."""

import numpy as np
import pytest
import torch
from conftest import logits, token_ids
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, RoFormerConfig

import rope_scaling
from references import formulas
from rope_scaling import RopeScalingError


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
