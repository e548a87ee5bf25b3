"""A model of the hub whose `main` has moved is not taken for the one that was measured."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from conftest import make_model

from rope_scaling.cli.main import main
from rope_scaling.eval.files import read_rows
from rope_scaling.hf.loading import load_tokenizer


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Puts a commit of `someone/model` into a hub cache of its own, and `main` at it; without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--model"

    def publish(commit, model):
        folder = repository / "snapshots" / commit
        model.save_pretrained(folder)
        load_tokenizer("demo").save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    yield publish
    shutil.rmtree(repository)


def test_a_revision_that_moved_is_another_model(publish, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 100)
    model = make_model("llama", vocab_size=4096)

    def evaluate(*more):
        command = ["evaluate", "--model", "someone/model", "--data", str(tmp_path / "text.txt"), "--lengths", "1x"]
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--method", "rerope", "--output", str(tmp_path / "run"), *more])
        return stopped.value.code, capsys.readouterr()

    publish("a" * 40, model)
    assert evaluate()[0] == 0
    first = read_rows(tmp_path / "run" / "rows.jsonl")
    code, again = evaluate()
    assert code == 0 and "scores were found in" in again.out

    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    publish("b" * 40, model)
    code, refused = evaluate()
    assert code == 2 and "hash of the model's weights and config" in refused.err
    assert read_rows(tmp_path / "run" / "rows.jsonl") == first
    assert evaluate("--fresh")[0] == 0
    second = read_rows(tmp_path / "run" / "rows.jsonl")
    assert all(a["nll"] != b["nll"] for a, b in zip(first, second, strict=True) if "nll" in a)
