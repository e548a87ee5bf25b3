"""`save_pretrained` of a patched model needs no call of ours, and plain Transformers reads it to the same logits."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, close, logits, make_model, other_family, rotary, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rope_scaling
from cases import arguments_of
from rope_scaling import AngleClip, LogN, ReRope, RopeScalingError, Yarn
from rope_scaling.frequencies import METHODS
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.pretrained_rope import pretrained_settings, read_pretrained
from rope_scaling.hf.rotary import rotary_slots


NATIVE = {
    "linear": "linear",
    "yarn": "yarn",
    "llama3": "llama3",
    "p_rope": "proportional",
    "ntk": "default",
    "abf": "default",
}

READER = """
import json, sys
sys.modules["rope_scaling"] = None  # any import of the library fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
out = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out[folder] = model(load_file(sys.argv[2])["ids"]).logits.contiguous()
save_file(out, sys.argv[3])
"""


def read_without_the_library(folders, tmp_path):
    """Logits that a process in which the library cannot be imported gets from saved folders, and what it printed."""
    save_file({"ids": token_ids(150)}, tmp_path / "ids.safetensors")
    arguments = [
        json.dumps([str(folder) for folder in folders]),
        str(tmp_path / "ids.safetensors"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "out.safetensors"), done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reads_every_method(family, tmp_path):
    model = make_model(family)
    slot = rotary_slots(model)[0]
    pairs = read_pretrained(slot, pretrained_settings(slot.module.config)).geometry.num_pairs
    wanted = {}
    for name in METHODS:
        folder = tmp_path / name
        rope_scaling.patch(model, name, **arguments_of(name, pairs))
        wanted[str(folder)] = logits(model)
        model.save_pretrained(folder)
    found, warnings = read_without_the_library(wanted, tmp_path)
    for folder, expected in wanted.items():
        assert close(found[folder], expected), folder
    for word in ("rope", "Unrecognized", "factor"):
        assert word not in warnings, warnings


def test_native_types_are_used_where_there_are(llama):
    for name in METHODS:
        rope_scaling.patch(llama, name, **arguments_of(name, 8))
        assert llama.config.rope_parameters["rope_type"] == NATIVE.get(name, "longrope"), name


def test_the_attention_factor_is_always_written_out(llama):
    for name in METHODS:
        rope_scaling.patch(llama, name, **arguments_of(name, 8))
        if llama.config.rope_parameters["rope_type"] in ("yarn", "longrope"):
            assert isinstance(llama.config.rope_parameters["attention_factor"], float), name


@pytest.mark.parametrize("name", METHODS)
def test_patch_without_arguments_makes_a_saved_patch_live_again(name, tmp_path):
    model = make_model("llama")
    original = logits(model)
    rope_scaling.patch(model, name, **arguments_of(name, 8))
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    # Not only close: at a million tokens, the last bit of a fast frequency is up to 0.06 radian.
    assert torch.equal(rotary(loaded).inv_freq, rotary(model).inv_freq)
    rope_scaling.patch(loaded)
    assert close(logits(loaded), logits(model))
    assert loaded.config.rope_scaling_patch == model.config.rope_scaling_patch
    loaded.save_pretrained(tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    rope_scaling.unpatch(loaded)
    assert close(logits(loaded), original)


def test_gemma3_round_trip_with_its_layer_types(tmp_path):
    model = make_model("gemma3")
    original = logits(model)
    rope_scaling.patch(model, "resonance", wrapped="yarn", factor=4, layer_types="all")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert close(logits(loaded), logits(model))
    assert close(logits(rope_scaling.patch(loaded)), logits(model))
    assert close(logits(rope_scaling.unpatch(loaded)), original)


def test_a_config_that_keeps_the_original_length_outside_its_rope_parameters(tmp_path):
    """Phi-3's does, and its value overrides the one inside whenever the config is made anew."""
    model = make_model("phi3", original_max_position_embeddings=4096)
    rope_scaling.patch(model, "yarn", factor=4).save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    rope_scaling.patch(loaded).save_pretrained(tmp_path / "second")
    assert close(logits(loaded), logits(model))
    assert (tmp_path / "first" / "config.json").read_bytes() == (tmp_path / "second" / "config.json").read_bytes()


def test_a_saved_patch_can_be_undone_without_making_it_live(tmp_path):
    model = make_model("llama")
    original = logits(model)
    rope_scaling.patch(model, "yarn", factor=4).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rope_scaling.unpatch(loaded)
    assert close(logits(loaded), original)
    assert not hasattr(loaded.config, RECORD_KEY)


def test_another_patch_on_a_saved_one_starts_from_the_pretrained_frequencies(tmp_path):
    rope_scaling.patch(make_model("llama"), "yarn", factor=4).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    fresh = logits(rope_scaling.patch(make_model("llama"), "linear", factor=2))
    with rope_scaling.patched(loaded, "linear", factor=2):
        assert close(logits(loaded), fresh)
    assert loaded.config.rope_scaling_patch["methods"][0]["name"] == "yarn"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": 99}, "format 99; this version reads 2 and 3. Update rope-scaling"),
        ({"methods": [{"name": "yran"}]}, "Unknown method 'yran'"),
        ({"methods": ["yarn"]}, "must have a `name`"),
        ({"surprise": 1}, "record is damaged"),
    ],
)
def test_a_damaged_record_is_refused(llama, damage, message):
    rope_scaling.patch(llama, "yarn", factor=4)
    llama.config.rope_scaling_patch = {**llama.config.rope_scaling_patch, **damage}
    with pytest.raises(RopeScalingError, match=message):
        rope_scaling.patch(llama)


@pytest.mark.parametrize("layer_types", [["global_attention"], [], None])
@pytest.mark.parametrize("method", ["yarn", "self_extend"])
def test_a_record_of_no_layer_type_of_the_model_is_refused(method, layer_types):
    model = rope_scaling.patch(make_model("gemma3"), method, target_length=256)
    model.config.rope_scaling_patch = {**model.config.rope_scaling_patch, "layer_types": layer_types}
    with pytest.raises(RopeScalingError, match="`layer_types` must name some of full_attention, sliding_attention"):
        rope_scaling.patch(model)


@pytest.mark.parametrize("method", ["yarn", "self_extend"])
def test_a_record_of_layer_types_is_refused_where_all_layers_rotate_alike(llama, method):
    rope_scaling.patch(llama, method, target_length=256)
    llama.config.rope_scaling_patch = {**llama.config.rope_scaling_patch, "layer_types": ["full_attention"]}
    with pytest.raises(RopeScalingError, match="`layer_types` must be null, because all layers rotate alike"):
        rope_scaling.patch(llama)


def test_a_record_that_contradicts_its_config_is_refused(llama, tmp_path):
    rope_scaling.patch(llama, "yarn", factor=4).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["factor"] = 2.0
    file.write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match="are not those of the patch it records: one of the two was edited"):
        rope_scaling.patch(loaded)
    rope_scaling.patch(loaded, "yarn", factor=4)
    assert close(logits(loaded.eval()), logits(llama))


def test_unpatched_models_save_without_a_trace(llama, tmp_path):
    llama.save_pretrained(tmp_path / "before")
    with rope_scaling.patched(llama, "yarn", factor=4):
        pass
    llama.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before" / "config.json").read_bytes() == (tmp_path / "after" / "config.json").read_bytes()


def test_hunyuans_base_is_read_at_every_length_after_a_patch_is_taken_back(tmp_path):
    """A fixed `alpha` is a base, which a saved patch that is taken back must not turn into `dynamic` scaling."""
    scaling = {"type": "dynamic", "alpha": 100.0, "factor": 1.0}
    model = other_family("HunYuanDenseV1Config", head_dim=16, rope_scaling=scaling)
    before = rotary(model).inv_freq.clone()
    wanted = logits(model, token_ids(150))
    if not torch.equal(rotary(model).inv_freq, before):
        pytest.skip("this Transformers drops `alpha` beyond the stated length by itself")
    rope_scaling.patch(model, "yarn", factor=2).save_pretrained(tmp_path)
    loaded = rope_scaling.unpatch(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert close(logits(loaded, token_ids(150)), wanted)


FORMAT_2 = Path(__file__).parents[1] / "golden" / "format_2"
"""Configs and an adapter's, as the version wrote them whose records have format 2."""


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("yarn", [Yarn(factor=4.0)]),
        ("rerope", [ReRope(window=20)]),
        ("angle_clip", [AngleClip(max_angles=(math.inf, 0.0, *[2.0] * 6)), LogN()]),
    ],
)
def test_a_folder_with_a_record_of_format_2_loads_as_it_was_saved(name, methods, tmp_path):
    model = make_model("llama")
    wanted = logits(rope_scaling.patch(model, *methods))
    model.save_pretrained(tmp_path)
    now = json.loads((tmp_path / "config.json").read_text())
    before = json.loads((FORMAT_2 / f"config-{name}.json").read_text())
    assert before[RECORD_KEY]["format"] == 2 and now[RECORD_KEY]["format"] == 3
    (tmp_path / "config.json").write_text(json.dumps(before))
    loaded = rope_scaling.from_pretrained(tmp_path)
    assert close(logits(loaded), wanted)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == now and before.keys() == now.keys() - {"transformers_version"}
    rope_scaling.unpatch(loaded)
    assert close(logits(loaded), logits(make_model("llama")))
