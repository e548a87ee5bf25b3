"""Adapters travel with the patch they were trained under, or say so."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import logits, make_model, strong, token_ids
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

import rope_scaling
from rope_scaling import RopeScalingError


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
PATCHES = {"yarn": {"factor": 4}, "rerope": {}, "dynamic_yarn": {}}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    strong("llama").save_pretrained(folder)
    return folder


def trained_adapter(base, name="yarn", **config):
    """An adapter that does something, on the patched base model."""
    from transformers import AutoModelForCausalLM

    model = rope_scaling.patch(AutoModelForCausalLM.from_pretrained(base), name, **PATCHES[name])
    model = rope_scaling.record_adapter(get_peft_model(model, LoraConfig(**LORA, **config))).eval()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", PATCHES)
def test_round_trip_in_a_fresh_process(base, tmp_path, name):
    model = trained_adapter(base, name)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""
import torch, rope_scaling
ids = torch.randint(2, 64, (1, 150), generator=torch.Generator().manual_seed(0))
model = rope_scaling.load_adapter({str(tmp_path / "adapter")!r})
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5)


def test_what_is_loaded_saves_its_record_again(base, tmp_path):
    trained_adapter(base).save_pretrained(tmp_path / "one")
    rope_scaling.load_adapter(tmp_path / "one").save_pretrained(tmp_path / "two")
    found = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert found[0]["rope_scaling_patch"] == found[1]["rope_scaling_patch"]


def test_merged_and_saved_it_is_a_plain_model(base, tmp_path):
    model = trained_adapter(base)
    wanted = logits(model)
    rope_scaling.load_adapter(model_folder(model, tmp_path)).merge_and_unload().save_pretrained(tmp_path / "merged")
    code = f"""
import sys
sys.modules["rope_scaling"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.randint(2, 64, (1, 150), generator=torch.Generator().manual_seed(0))
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}).eval()
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-5)


def model_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("load", [AutoPeftModelForCausalLM.from_pretrained, None])
def test_plain_peft_warns_with_the_name_of_what_loads_it(base, tmp_path, load):
    folder = model_folder(trained_adapter(base), tmp_path)
    with pytest.warns(UserWarning, match=r"load this adapter with rope_scaling\.load_adapter"):
        load(folder) if load else PeftModel.from_pretrained(strong("llama"), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rope_scaling.load_adapter(folder)


def test_on_a_loaded_base(base, tmp_path):
    model = trained_adapter(base)
    wanted, folder = logits(model), model_folder(model, tmp_path)
    for own in (strong("llama"), rope_scaling.patch(strong("llama"), "yarn", factor=4)):
        assert torch.allclose(logits(rope_scaling.load_adapter(folder, own)), wanted, atol=1e-5)


def test_an_adapter_with_a_record_of_format_2(base, tmp_path, monkeypatch):
    """As the version before wrote it, on a base that this version patched, and on one that it patches itself."""
    monkeypatch.setitem(PATCHES, "yarn", {"factor": 2})
    model = trained_adapter(base)
    wanted, folder = logits(model), model_folder(model, tmp_path)
    before = json.loads((Path(__file__).parents[1] / "golden" / "format_2" / "adapter_config.json").read_text())
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    assert before["rope_scaling_patch"]["format"] == 2 and config["rope_scaling_patch"]["format"] == 3
    file.write_text(json.dumps(config | {"rope_scaling_patch": before["rope_scaling_patch"]}))
    for own in (strong("llama"), rope_scaling.patch(strong("llama"), "yarn", factor=2)):
        assert torch.allclose(logits(rope_scaling.load_adapter(folder, own)), wanted, atol=1e-5)


def test_a_base_under_another_patch(base, tmp_path):
    folder = model_folder(trained_adapter(base), tmp_path)
    for other in (("yarn", {"factor": 2}), ("ntk", {"factor": 4})):
        model = rope_scaling.patch(strong("llama"), other[0], **other[1])
        with pytest.raises(RopeScalingError, match=r"trained under yarn:factor=4 .*carries " + other[0]):
            rope_scaling.load_adapter(folder, model)


def test_the_wrong_base(base, tmp_path):
    folder = model_folder(trained_adapter(base), tmp_path)
    with pytest.raises(RopeScalingError, match="made on another model: `max_position_embeddings` there 64, here 32"):
        rope_scaling.load_adapter(folder, make_model("llama", max_position_embeddings=32))
    with pytest.raises(RopeScalingError, match="does not fit this base model"):
        rope_scaling.load_adapter(folder, make_model("llama", hidden_size=32, head_dim=16))
    import shutil

    shutil.rmtree(base)
    with pytest.raises(RopeScalingError, match="the adapter's base model"):
        rope_scaling.load_adapter(folder)


def test_no_memory_is_not_the_wrong_base(base, tmp_path, monkeypatch):
    import peft

    folder = model_folder(trained_adapter(base), tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    with pytest.raises(RopeScalingError, match="Cannot load the adapter .*out of memory.* Free memory"):
        rope_scaling.load_adapter(folder)


def test_without_a_record(base, tmp_path):
    model = get_peft_model(strong("llama"), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(RopeScalingError, match="records no patch. If it was trained without one"):
        rope_scaling.load_adapter(tmp_path / "plain")
    with pytest.raises(RopeScalingError, match="not patched: there is nothing to record"):
        rope_scaling.record_adapter(model)
    with pytest.raises(RopeScalingError, match="takes what `peft.get_peft_model` returns; got LlamaForCausalLM"):
        rope_scaling.record_adapter(strong("llama"))
    with pytest.raises(RopeScalingError, match="There is no adapter in"):
        rope_scaling.load_adapter(tmp_path / "nothing")


def test_several_adapters_all_carry_it(base, tmp_path):
    model = trained_adapter(base)
    model.add_adapter("other", LoraConfig(**LORA, r=4))
    rope_scaling.record_adapter(model).save_pretrained(tmp_path / "both")
    for folder in (tmp_path / "both", tmp_path / "both" / "other"):
        assert json.loads((folder / "adapter_config.json").read_text())["rope_scaling_patch"]["methods"]


def test_embeddings_and_norms_beside_adapters(base, tmp_path):
    """LongLoRA's: trained in full, saved with the adapter, tied weights stay tied."""
    model = trained_adapter(base, modules_to_save=["embed_tokens", "norm"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter += 0.05 * torch.randn_like(parameter)
    wanted = logits(model)
    loaded = rope_scaling.load_adapter(model_folder(model, tmp_path))
    assert torch.allclose(logits(loaded), wanted, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), wanted, atol=1e-5)


def test_generation_through_an_adapter(base, tmp_path):
    model = trained_adapter(base, "rerope")
    loaded = rope_scaling.load_adapter(model_folder(model, tmp_path))
    ids = token_ids(100)
    one, other = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, loaded))
    assert torch.equal(one, other)


def saved_record(folder):
    return json.loads((folder / "adapter_config.json").read_text()).get("rope_scaling_patch")


def test_the_record_is_that_of_the_patch_when_it_is_saved(base, tmp_path):
    model = trained_adapter(base)
    rope_scaling.patch(model, "yarn", factor=8)
    model.add_adapter("later", LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "eight", True, ["default"])
    model.save_pretrained(tmp_path / "both")
    for folder in (tmp_path / "eight", tmp_path / "both", tmp_path / "both" / "later"):
        assert saved_record(folder)["methods"][0]["factor"] == 8
    assert not (tmp_path / "eight" / "later").exists()
    wanted = logits(model)
    assert torch.allclose(logits(rope_scaling.load_adapter(tmp_path / "both")), wanted, atol=1e-5)
    rope_scaling.unpatch(model).save_pretrained(tmp_path / "plain")
    assert saved_record(tmp_path / "plain") is None
    model.save_pretrained(tmp_path / "other", is_main_process=False)


def test_prefix_tuning_goes_with_a_frequency_method(base):
    """Its cache holds learned keys, which nothing has rotated, so it belongs to no frequencies."""
    from peft import PrefixTuningConfig
    from transformers import AutoModelForCausalLM

    model = rope_scaling.patch(AutoModelForCausalLM.from_pretrained(base), "yarn", factor=4)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    assert logits(model, token_ids(20)).isfinite().all()
    with torch.no_grad():
        assert model.generate(input_ids=token_ids(20), max_new_tokens=3).shape == (1, 23)
