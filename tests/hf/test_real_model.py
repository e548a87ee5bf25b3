"""A real pretrained model, named by ROPE_SCALING_REAL_MODEL: toy models lie."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import rope_scaling
from cases import arguments_of
from rope_scaling.eval.documents import make_documents
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.frequencies import METHODS
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.texts import read_texts


FOLDER = os.environ.get("ROPE_SCALING_REAL_MODEL")
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not FOLDER, reason="needs ROPE_SCALING_REAL_MODEL, the folder of a real Llama-style model"),
]


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)


def test_every_method_takes_effect_and_goes_back(model):
    ids = torch.arange(100, 400)[None]
    pairs = len(model.model.rotary_emb.inv_freq)
    with torch.no_grad():
        original = model(ids).logits
        for name in METHODS:
            with rope_scaling.patched(model, name, **arguments_of(name, pairs)):
                assert not torch.equal(model(ids).logits, original), name
            assert torch.equal(model(ids).logits, original), name


def test_saved_and_read_by_plain_transformers(model, tmp_path):
    full = load_model(FOLDER, "float32")
    ids = torch.arange(100, 400)[None]
    rope_scaling.patch(full, "mrrope_pro", factor=4).save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = full(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(ids).logits
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_collapses_beyond_its_trained_length_and_yarn_mends_it(model):
    """One document of twice the trained length: its last thousand tokens, unpatched and under YaRN."""
    length = 2 * model.config.max_position_embeddings
    (document,) = make_documents(read_texts("python-reference"), load_tokenizer(FOLDER), [length]).items
    plain = nll_curve(model, document.ids[None], 2048)[0, -1000:].mean()
    with rope_scaling.patched(model, "yarn", factor=2):
        mended = nll_curve(model, document.ids[None], 2048)[0, -1000:].mean()
    assert plain - mended > 1.0
