"""A checkpoint whose patch lives in attention: refused by plain Transformers with the line to use, restored by
ours."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import apply, logits, make_model, strong, token_ids
from transformers import AutoModelForCausalLM

import rope_scaling
from rope_scaling import RopeScalingError
from span_cases import SPAN_CASES


READ_PLAIN = """
import sys
sys.modules["rope_scaling"] = None  # whatever is installed, this process cannot import it
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("LOADED")
"""
READ_OURS = """
import sys
import torch
import rope_scaling
for folder in sys.argv[1:]:
    model = rope_scaling.from_pretrained(folder)
    ids = torch.randint(2, 64, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
    model.save_pretrained(folder + "/again")
"""


def run(code, *folders):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings(model):
    values = model.config.to_dict()
    return {name: values.get(name) for name in ("rope_parameters", "max_position_embeddings", "hidden_act")}


FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "phi3", "gemma2", "llama3.1"]


def test_plain_transformers_fails_and_names_the_line(tmp_path):
    for family in FAMILIES:
        apply(make_model(family), "rerope").save_pretrained(tmp_path / family)
    lines = run(READ_PLAIN, *(tmp_path / family for family in FAMILIES)).splitlines()
    assert len(lines) == len(FAMILIES)
    for line in lines:
        assert line.startswith("KeyError") and "load it with rope_scaling.from_pretrained(folder)" in line


def test_every_patch_comes_back_in_a_fresh_process_twice(tmp_path):
    wanted = {}
    for case in SPAN_CASES:
        model = apply(strong("llama"), case)
        wanted[case] = logits(model)
        model.save_pretrained(tmp_path / case)
    run(READ_OURS, *(tmp_path / case for case in SPAN_CASES))
    run(READ_OURS, *(tmp_path / case / "again" for case in SPAN_CASES))
    for case, expected in wanted.items():
        for folder in (tmp_path / case, tmp_path / case / "again"):
            assert torch.allclose(torch.load(folder / "logits.pt"), expected, atol=1e-5), (case, folder)
        first, second = ((tmp_path / case / again / "config.json").read_text() for again in ("", "again"))
        assert json.loads(first) == json.loads(second)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_in_every_family_and_back(family, tmp_path):
    model = make_model(family)
    before, config = logits(model), settings(model)
    wanted = logits(apply(model, "rerope+log_n"))
    model.save_pretrained(tmp_path)
    loaded = rope_scaling.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), wanted, atol=1e-5)
    assert torch.allclose(logits(rope_scaling.unpatch(loaded)), before, atol=1e-5)
    assert settings(loaded) == config and "rope_scaling" not in loaded.config.to_json_string(use_diff=False)
    assert settings(rope_scaling.unpatch(model)) == config


def test_patch_without_arguments_on_a_model_whose_config_was_mended_by_hand(tmp_path):
    model = apply(strong("llama"), "dual_chunk")
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=plain).eval()
    assert torch.allclose(logits(rope_scaling.patch(loaded)), wanted, atol=1e-5)


def test_from_pretrained_also_makes_frequency_patches_live(tmp_path):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    model.save_pretrained(tmp_path)
    loaded = rope_scaling.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert "yarn:factor=4" in rope_scaling.describe(loaded).slots[0].method


def test_what_was_never_patched_is_said_so(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match="records no patch. Load it with `AutoModelForCausalLM"):
        rope_scaling.from_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match="There is no model folder"):
        rope_scaling.from_pretrained("./nowhere")


def test_a_method_of_ones_own_is_restored_once_it_is_known(tmp_path, monkeypatch):
    class Mine(rope_scaling.ReRope):
        name = "mine"

    model = rope_scaling.patch(strong("llama"), Mine(window=20))
    model.save_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match=r"Unknown method 'mine'.*rope_scaling.METHODS\['mine'\] = YourMethod"):
        rope_scaling.from_pretrained(tmp_path)
    monkeypatch.setitem(rope_scaling.METHODS, "mine", Mine)
    assert torch.allclose(logits(rope_scaling.from_pretrained(tmp_path)), logits(model), atol=1e-5)


def test_peft_adapters_over_a_patched_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = strong("llama")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    rope_scaling.patch(adapted, "self_extend", window=20)
    wanted = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = rope_scaling.patch(strong("llama"), "self_extend", window=20)
    assert torch.allclose(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), wanted, atol=1e-5)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(rope_scaling.from_pretrained(tmp_path / "merged"), token_ids(150)), wanted, atol=1e-5)
