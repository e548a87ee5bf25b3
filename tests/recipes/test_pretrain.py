"""The recipe of the embedded model runs: a few steps, and everything it writes is there and loads."""

import json
import math
from importlib import resources
from itertools import pairwise

import pytest
import torch

from rope_scaling.demo import corpus
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.recipes import pretrain, search_longrope


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_steps": 3,
    "batch_size": 2,
}


@pytest.fixture
def small_corpus(monkeypatch):
    texts = {f"m{i}.py": f"def f{i}(x):\n    return x + {i}\n" * 120 for i in range(4)}
    monkeypatch.setattr(corpus, "training_documents", lambda: texts)
    monkeypatch.setattr(corpus, "held_out_documents", lambda: {"held.py": "class A:\n    x = 1\n" * 1500})


@pytest.fixture
def small_config(monkeypatch):
    load = pretrain.load_config
    overrides = SMALL | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "eval_steps": 2,
        "warmup_steps": 1,
    }
    monkeypatch.setattr(pretrain, "load_config", lambda name, **given: load(name, **{**given, **overrides}))


def test_writes_a_model_that_loads(small_corpus, small_config, tmp_path, capsys):
    pretrain.main(["--output_dir", str(tmp_path)])
    quality = json.loads(capsys.readouterr().out.split("\n{\n", 1)[1].join(["{", ""]))
    assert quality == json.loads((tmp_path / "training.json").read_text())["quality"]
    assert math.isfinite(quality["bits_per_byte"]) and quality["xz_bits_per_byte"] > 0
    model, tokenizer = load_model(str(tmp_path), "stored"), load_tokenizer(str(tmp_path))
    assert model.dtype == torch.bfloat16
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_windows_depend_on_seed_and_index_alone(small_corpus):
    config = pretrain.load_config("pretrain_demo", vocab_size=300, retrieval_share=0.5)
    tokenizer = pretrain.train_tokenizer(corpus.training_documents().values(), config)
    stream = pretrain.token_stream(corpus.training_documents().values(), tokenizer)
    one, other = (pretrain.Windows(stream, tokenizer, config, 40) for _ in range(2))
    for i in reversed(range(40)):
        assert torch.equal(one[i]["input_ids"], other[i]["input_ids"])
        assert one[i]["input_ids"].shape == (256,) and one[i]["input_ids"][0] == tokenizer.bos_token_id
        used = one[i]["labels"] != -100
        assert torch.equal(one[i]["labels"][used], one[i]["input_ids"][used])


def test_an_unknown_key_is_an_error(tmp_path):
    good = (resources.files("rope_scaling.recipes") / "pretrain_demo.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(good + "vocab_sise: 3\n")
    with pytest.raises(ValueError, match="vocab_sise"):
        pretrain.load_config(str(tmp_path / "bad.yaml"))


def test_mutated_longrope_factors_keep_their_bounds():
    import random

    rng, factors = random.Random(0), [1.0] * 16 + [8.0] * 16
    for _ in range(200):
        factors = search_longrope.mutate(factors, 8.0, rng)
        assert all(1.0 <= a <= b <= 10.0 for a, b in pairwise(factors))


def test_the_search_never_returns_worse_than_its_seeds(tmp_path, capsys):
    arguments = ["--documents", "1", "--generations", "1", "--children", "2", "--output", str(tmp_path / "found.json")]
    search_longrope.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["search_loss"] <= found["best_seed_loss"]
    assert len(found["long_factor"]) == 32
