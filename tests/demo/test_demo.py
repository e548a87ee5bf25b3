"""The embedded model is what its card says: small, real, and in need of this library beyond 256 tokens."""

import json
import random
from importlib import resources
from pathlib import Path

import pytest
import torch

import rope_scaling
from rope_scaling.demo import corpus, retrieval
from rope_scaling.eval.documents import make_documents
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.hf.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def documents(tokenizer):
    return make_documents(corpus.held_out_documents().items(), tokenizer, [2048], max_documents=6).items


def test_is_an_ordinary_llama(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.tie_word_embeddings and load_model("demo", "stored").dtype == torch.bfloat16
    text = "def f(x):\n    return x  # naïve ☃"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id


def test_collapses_beyond_its_trained_length_and_is_mended(model, documents):
    """At 4x to 8x the unpatched model is far worse than where it was trained; YaRN brings most of it back."""

    def late(curve):
        return curve[1024:].mean().item()

    plain = torch.cat([nll_curve(model, document.ids[None], 2048) for document in documents])
    trained = plain[:, 128:255].mean().item()
    with rope_scaling.patched(model, "yarn", factor=8):
        mended = torch.cat([nll_curve(model, document.ids[None], 2048) for document in documents])
    assert late(plain.T) - trained > 1.0
    assert late(mended.T) < late(plain.T) - 1.5


def test_training_and_held_out_text_do_not_meet():
    held_out, training = corpus.held_out_documents(), corpus.training_documents()
    assert not held_out.keys() & training.keys()
    assert "test/test_argparse.py" not in training
    assert len(held_out) >= 0.9 * len(corpus.held_out_names())
    assert not set(held_out.values()) & set(training.values())


def test_the_card_has_the_retrieval_rows():
    root = Path(__file__).parents[2]
    card = (root / "rope_scaling" / "demo" / "model" / "README.md").read_text()
    rows = [
        json.loads(line) for line in (root / "benchmarks" / "results" / "retrieval.jsonl").read_text().splitlines()
    ]
    for method, label in (("unpatched", "unpatched"), ("yarn", "yarn, factor 8")):
        for task in ("copy", "lookup"):
            cells = [f"{r['correct']} of {r['asked']}" for r in rows if (r["method"], r["task"]) == (method, task)]
            assert f"| {task}, {label} | {' | '.join(cells)} |" in card


def test_the_card_states_the_committed_numbers():
    folder = resources.files("rope_scaling.demo") / "model"
    quality = json.loads((folder / "training.json").read_text())["quality"]
    card = (folder / "README.md").read_text()
    assert quality["bits_per_byte"] < quality["xz_bits_per_byte"]
    for value in (
        f"{quality['bits_per_byte']:.3f}",
        f"{quality['xz_bits_per_byte']:.3f}",
        f"{quality['parameters']:,}",
        quality["python"],
    ):
        assert value in card


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_copy_examples_ask_for_what_stood_before(tokenizer, length):
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    filler = encode("import os\n" * length)
    example = retrieval.copy_example(random.Random(0), encode, filler, length, span=length // 4)
    ((start, end),) = example.answers
    answer = example.ids[start:end]
    assert len(example.ids) == length and len(answer) == length // 4
    assert any(example.ids[i : i + len(answer)] == answer for i in range(start))


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_lookup_examples_ask_for_keys_of_the_table(tokenizer, length):
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    filler = encode("import os\n" * length)
    example = retrieval.lookup_example(random.Random(1), encode, filler, length, num_keys=4)
    text = tokenizer.decode(example.ids)
    assert len(example.ids) <= length and len(example.answers) >= 3
    for start, end in example.answers:
        question = tokenizer.decode(example.ids[:start]).rsplit('assert table["', 1)[1]
        key, value = question.split('"')[0], tokenizer.decode(example.ids[start:end]).strip()
        assert f'"{key}": {value},' in text
