"""Encoders: frequencies, and windows to both sides, against masks written out by hand."""

import copy
import pickle

import pytest
import torch
from conftest import close, logits, token_ids
from transformers import AutoModelForMaskedLM, EuroBertConfig, ModernBertConfig

import rope_scaling
from rope_scaling import RopeScalingError, SlidingWindow


LENGTH, WINDOW = 100, 8


def make(name="eurobert"):
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15}
    if name == "eurobert":
        return AutoModelForMaskedLM.from_config(EuroBertConfig(**common, num_key_value_heads=2)).eval()
    config = ModernBertConfig(
        **common, local_attention=40, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    return AutoModelForMaskedLM.from_config(config).eval()  # fmt: skip


def band(width, length=LENGTH):
    places = torch.arange(length)
    return ((places[:, None] - places[None]).abs() < width)[None, None]


def test_the_window_is_a_band_to_both_sides():
    model = make()
    wanted = logits(model, token_ids(LENGTH), attention_mask=band(WINDOW))
    rope_scaling.patch(model, "sliding_window", window=WINDOW)
    found = logits(model, token_ids(LENGTH))
    assert close(found, wanted) and not close(found, logits(make(), token_ids(LENGTH)))
    rope_scaling.unpatch(model)
    assert torch.equal(logits(model, token_ids(LENGTH)), logits(make(), token_ids(LENGTH)))


@pytest.mark.parametrize("window", [12, 30])
def test_layers_with_a_window_of_their_own_keep_the_narrower_one(window):
    model = make("modernbert")
    own = band(model.config.sliding_window + 1)
    assert model.config.sliding_window == 20
    masks = {"full_attention": band(window), "sliding_attention": own & band(window)}
    wanted = logits(model, token_ids(LENGTH), attention_mask=masks)
    assert close(logits(rope_scaling.patch(model, "sliding_window", window=window), token_ids(LENGTH)), wanted)


def test_padding_on_either_side_changes_nothing():
    model = rope_scaling.patch(make(), SlidingWindow(window=WINDOW), rope_scaling.Linear(factor=2))
    alone = logits(model, token_ids(60))
    for left, right in ((0, 40), (40, 0)):
        ids = torch.nn.functional.pad(token_ids(60), (left, right))
        mask = torch.nn.functional.pad(torch.ones(1, 60, dtype=torch.long), (left, right))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        padded = logits(model, ids, attention_mask=mask, position_ids=places)
        assert torch.allclose(padded[:, left : left + 60], alone, atol=1e-5)


def test_saved_copied_and_pickled(tmp_path):
    model = rope_scaling.patch(make(), "sliding_window", window=WINDOW)
    wanted = logits(model, token_ids(LENGTH))
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"rope_scaling\.from_pretrained"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded = rope_scaling.from_pretrained(tmp_path, AutoModelForMaskedLM)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(logits(other, token_ids(LENGTH)), wanted)
        assert rope_scaling.diagnose(other).healthy
    assert "sliding_window:window=8" in str(rope_scaling.describe(loaded))


@pytest.mark.parametrize("method", [SlidingWindow(window=8, num_sinks=2), rope_scaling.ReRope(), rope_scaling.LogN()])
def test_what_needs_causal_attention_is_refused(method):
    model = make()
    with pytest.raises(RopeScalingError, match="uses bidirectional attention.*`sliding_window` without sinks"):
        rope_scaling.patch(model, method)
    assert torch.equal(logits(model), logits(make()))
