"""Reference models of preference tuning carry the patch of the model that is trained."""

import copy
import math
import warnings

import pytest
import transformers
from conftest import strong
from transformers import AutoModelForCausalLM

import rope_scaling
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.loading import load_tokenizer


trl = pytest.importorskip("trl")


@pytest.fixture
def folder(tmp_path):
    tokenizer = load_tokenizer("demo")
    strong("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def first_loss(model, folder, **arguments):
    """The loss before any step, ln 2 if policy and reference are the same model; and the trainer."""
    from datasets import Dataset

    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt = " ".join(f"def f{i}(x): return x + {i}" for i in range(20))
    data = Dataset.from_dict({"prompt": [prompt] * 2, "chosen": [" return x"] * 2, "rejected": [" import os"] * 2})
    options = {"per_device_train_batch_size": 2, "max_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}
    config = trl.DPOConfig(output_dir=str(folder.parent / "out"), **options)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, **arguments)
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row), trainer


@pytest.mark.parametrize(("method", "arguments"), [("yarn", {"factor": 4}), ("rerope", {"window": 20})])
def test_a_reference_model_that_the_trainer_loads(folder, method, arguments):
    model = rope_scaling.patch(AutoModelForCausalLM.from_pretrained(folder), method, **arguments)
    with pytest.warns(UserWarning, match=f"DPOTrainer loaded its reference model by name.*{method}"):
        loss, trainer = first_loss(model, folder)
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    assert read_description(trainer.ref_model).slots[0].method == read_description(model).slots[0].method
    assert rope_scaling.unpatch(trainer.ref_model).config._attn_implementation == "sdpa"


def test_a_reference_model_that_is_given(folder):
    model = rope_scaling.patch(AutoModelForCausalLM.from_pretrained(folder), "rerope", window=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reference model.*")
        loss, _ = first_loss(model, folder, ref_model=copy.deepcopy(model))
    assert loss == pytest.approx(math.log(2), abs=1e-4)


def test_other_models_are_left_alone(folder):
    """An unpatched policy, and a model that the user loads beside a patched one."""
    _, trainer = first_loss(AutoModelForCausalLM.from_pretrained(folder), folder)
    assert read_description(trainer.ref_model).slots[0].method == "not patched"
    rope_scaling.patch(AutoModelForCausalLM.from_pretrained(folder), "yarn", factor=4)
    other = transformers.LlamaForCausalLM.from_pretrained(folder)
    other(other.dummy_inputs["input_ids"])
    assert read_description(other).slots[0].method == "not patched"
