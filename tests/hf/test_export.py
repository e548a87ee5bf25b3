"""Exported folders hold what servers need: readers that know nothing of this library find the live frequencies."""

import json

import pytest
import torch
from conftest import apply, close, logits, make_model, rotary, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rope_scaling
from cases import METHOD_CASES
from references.readers import READERS
from rope_scaling import RopeScalingError
from rope_scaling.exporters.targets import TARGETS
from rope_scaling.hf.loading import load_tokenizer


PORTABLE_TO_LLAMA_CPP = {"linear", "ntk", "yarn", "llama3", "abf"}


def exported(model, folder, target):
    return json.loads((rope_scaling.export(model, folder, target) / "config.json").read_text())


def agree(reader, config, module, length):
    inv_freq, attention_factor, served = reader(config)
    wanted = module.inv_freq.double()
    assert torch.allclose(torch.tensor(inv_freq, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-30)
    assert attention_factor == pytest.approx(module.attention_scaling, rel=1e-6)
    assert served == length


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "llama3.1", "qwen2-yarn"])
@pytest.mark.parametrize("case", METHOD_CASES)
@pytest.mark.parametrize("target", READERS)
def test_every_reader_finds_the_live_frequencies(target, case, family, tmp_path):
    model = apply(make_model(family), case)
    if target == "llama.cpp" and model.config.rope_parameters["rope_type"] in ("longrope", "proportional"):
        assert case not in PORTABLE_TO_LLAMA_CPP or family not in ("llama", "gpt_neox")
        with pytest.raises(RopeScalingError, match="or export the nearest, 'yarn' or 'ntk'"):
            rope_scaling.export(model, tmp_path / "out", target)
        assert not list(tmp_path.iterdir())
        return
    config = exported(model, tmp_path / "out", target)
    for reader in READERS[target]:
        agree(reader, config, rotary(model), model.config.max_position_embeddings)


@pytest.mark.parametrize("case", ["linear", "ntk", "yarn", "mrrope_pro", "p_rope"])
@pytest.mark.parametrize("target", TARGETS)
def test_plain_transformers_loads_every_export_to_the_same_logits(target, case, tmp_path):
    if target == "llama.cpp" and case in ("mrrope_pro", "p_rope"):
        pytest.skip("refused")
    model = apply(make_model("llama"), case)
    rope_scaling.export(model, tmp_path / "out", target)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


@pytest.mark.parametrize("settings", [{"attention_factor": 1.0}, {"truncate": False}, {"beta_fast": 16.0}])
def test_yarn_with_settings_that_not_all_servers_read(settings, tmp_path):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4, **settings)
    for target in ("transformers-v4", "vllm", "sglang"):
        config = exported(model, tmp_path / target, target)
        for reader in READERS[target]:
            agree(reader, config, rotary(model), 256)


def test_a_model_as_it_arrived():
    assert rope_scaling.config_overrides(make_model("llama3.1"), "vllm")["rope_parameters"]["rope_type"] == "llama3"


def test_overrides_for_a_server_that_has_the_weights():
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    assert rope_scaling.config_overrides(model, "transformers") == {
        "max_position_embeddings": 256,
        "rope_parameters": json.loads(json.dumps(model.config.rope_parameters)),
    }
    overrides = rope_scaling.config_overrides(model, "vllm")
    assert overrides["rope_scaling"] == overrides["rope_parameters"] and overrides["rope_theta"] == 10000.0
    overrides = rope_scaling.config_overrides(model, "transformers-v4")
    assert "rope_theta" not in overrides["rope_scaling"] and overrides["rope_theta"] == 10000.0


@pytest.mark.parametrize("case", ["as loaded", "linear", "ntk", "yarn", "mrrope_pro", "p_rope"])
def test_what_was_written_for_transformers_4_keeps_both_forms_in_every_further_save(case, tmp_path):
    model = make_model("llama3.1") if case == "as loaded" else apply(make_model("llama"), case)
    first = exported(model, tmp_path / "0", "transformers-v4")
    for number in (1, 2):
        again = rope_scaling.from_pretrained(tmp_path / str(number - 1))
        again.save_pretrained(tmp_path / str(number))
        saved = json.loads((tmp_path / str(number) / "config.json").read_text())
        for key in ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"):
            assert saved[key] == first[key], key
        for reader in READERS["transformers-v4"]:
            agree(reader, saved, rotary(model), model.config.max_position_embeddings)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert torch.equal(logits(plain), logits(again)) and close(logits(plain), logits(model))


def test_a_trainers_checkpoint_of_it_keeps_both_forms(tmp_path):
    first = exported(apply(make_model("llama"), "yarn"), tmp_path / "v4", "transformers-v4")
    model = rope_scaling.from_pretrained(tmp_path / "v4")
    rows = [{"input_ids": row, "labels": row} for row in token_ids(32, rows=2)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    saved = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        assert saved[key] == first[key], key


def test_the_older_form_follows_what_is_patched_and_goes_where_it_cannot(tmp_path):
    rope_scaling.export(make_model("llama"), tmp_path / "v4", "transformers-v4")
    model = rope_scaling.from_pretrained(tmp_path / "v4")

    def saved(name):
        model.save_pretrained(tmp_path / name)
        return json.loads((tmp_path / name / "config.json").read_text())

    with rope_scaling.patched(model, "yarn", factor=4):
        config = saved("yarn")
        assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_theta"] == 10000.0
        for reader in READERS["transformers-v4"]:
            agree(reader, config, rotary(model), 256)
        rope_scaling.patch(model, "ntk", factor=4)
        config = saved("ntk")
        assert config["rope_scaling"] is None and config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    with rope_scaling.patched(model, "self_extend"):
        assert not {"rope_scaling", "rope_theta"} & saved("spans").keys()
    assert saved("as it was")["rope_theta"] == 10000.0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "v4")
    rope_scaling.export(plain, tmp_path / "vllm", "vllm")
    assert "rope_scaling_export" not in json.loads((tmp_path / "vllm" / "config.json").read_text())


def test_the_doctor_tells_that_plain_transformers_left_the_older_form_out(tmp_path):
    rope_scaling.export(rope_scaling.patch(make_model("llama"), "yarn", factor=4), tmp_path / "v4", "transformers-v4")
    assert "RS301" not in str(rope_scaling.diagnose(str(tmp_path / "v4"), targets="transformers-v4"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "v4").save_pretrained(tmp_path / "plain")
    said = " ".join(str(rope_scaling.diagnose(str(tmp_path / "plain"), targets="transformers-v4")).split())
    assert "RS301" in said and "before plain Transformers 5 saved it again" in said


@pytest.mark.parametrize(("method", "nearest"), [("dynamic_ntk", "ntk"), ("self_extend", "yarn")])
def test_what_lives_in_attention_is_refused_with_the_nearest_method(method, nearest, tmp_path):
    model = rope_scaling.patch(make_model("llama"), method)
    with pytest.raises(RopeScalingError, match=f"The nearest that can be exported: '{nearest}' at the target length"):
        rope_scaling.export(model, tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    tokenizer = load_tokenizer("demo")
    folder = rope_scaling.export(model, tmp_path / "a" / "out", "vllm", tokenizer)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 256
    assert "vllm serve THIS_FOLDER --max-model-len 256" in (folder / "README.md").read_text()
    with pytest.raises(RopeScalingError, match="exists and is not empty. Give a new folder"):
        rope_scaling.export(model, folder, "vllm")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rope_scaling.export(model, tmp_path / "b", "vllm", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_bad_targets_and_wrapped_models(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    with pytest.raises(RopeScalingError, match="Unknown target 'vlm'. Did you mean 'vllm'"):
        rope_scaling.export(model, tmp_path / "out", "vlm")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RopeScalingError, match="an adapter is merged first"):
        rope_scaling.export(wrapped, tmp_path / "out", "vllm")
    merged = wrapped.merge_and_unload()
    config = exported(merged, tmp_path / "out", "vllm")
    agree(READERS["vllm"][0], config, rotary(model), 256)
