"""Families whose settings other readers look for elsewhere: every export is read back, or refused with what to do."""

import copy
import json
import re

import pytest
import torch
import transformers
from conftest import TRAINED_LENGTH, close, logits, rotary
from transformers import AutoModelForCausalLM

import rope_scaling
from references.readers import (
    READERS,
    of_layer_type,
    overridden,
    query_scale,
    sections,
    transformers_v4,
    vllm,
)
from rope_scaling import RopeScalingError, diagnose


V4, SERVERS = "transformers-v4", ("vllm", "sglang")
_COMMON = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": TRAINED_LENGTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 2},
}
FAMILIES = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": None}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "phi": ("PhiConfig", _GROUPED),
    "glm": ("GlmConfig", {**_GROUPED, "head_dim": 16}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "nemotron": ("NemotronConfig", {**_GROUPED, "head_dim": 16}),
    "cohere2": ("Cohere2Config", {**_GROUPED, "head_dim": 16}),
    "olmo": ("OlmoConfig", _GROUPED),
    "phi3": ("Phi3Config", {**_GROUPED, "original_max_position_embeddings": TRAINED_LENGTH}),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "falcon": ("FalconConfig", {**_COMMON, "alibi": False}),
    "gpt_oss": ("GptOssConfig", {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "sliding_window": 32}),
    "deepseek_v3": ("DeepseekV3Config", {**_COMMON, **_LATENT, "num_key_value_heads": 4}),
    "ministral3": ("Ministral3Config", {**_GROUPED, "head_dim": 16, "sliding_window": None}),
}
_REACH = {"original_max_position_embeddings": TRAINED_LENGTH // 4, "factor": 4.0}
_YARN = {"rope_type": "yarn", **_REACH}
ARRIVALS = {
    "default": {"rope_type": "default"},
    "as the class has it": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": _YARN,
    "yarn, finetuned": {**_YARN, "finetuned": True},
    "yarn, untruncated": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    "yarn, two temperatures": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "llama3": {"rope_type": "llama3", **_REACH, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"rope_type": "longrope", **_REACH, "attention_factor": 1.0},
    "query scale": {**_YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "half rotated": {"partial_rotary_factor": 0.5},
    "all rotated": {"partial_rotary_factor": 1.0},
}
CASES = [
    *(("llama", arrival) for arrival in list(ARRIVALS)[:9] if arrival != "as the class has it"),
    *(("mistral", "yarn, finetuned"), ("cohere2", "linear"), ("qwen3", "yarn"), ("falcon", "default")),
    *(
        ("gpt_neox", "half rotated"),
        ("gpt_neox", "all rotated"),
        ("gpt_neox", "as the class has it"),
        ("gpt_neox", "linear"),
    ),
    *(("phi", "half rotated"), ("phi", "all rotated"), ("stablelm", "all rotated"), ("glm", "half rotated")),
    *(
        ("nemotron", "default"),
        ("olmo", "default"),
        ("olmo", "linear"),
        ("phi3", "default"),
        ("smollm3", "as the class has it"),
    ),
    *(("gpt_oss", "yarn, untruncated"), ("deepseek_v3", "default"), ("deepseek_v3", "yarn, two temperatures")),
    ("ministral3", "query scale"),
]
PATCHED = [(method, *case) for case in CASES for method in (None, "yarn", "mrrope_pro")]
PATCHED += [("ntk", *case) for case in CASES if "rope_type" not in ARRIVALS[case[1]] or case[1] == "default"]
TAKEN = {
    ("nemotron", V4): {"default"},
    ("olmo", V4): {"default", "linear"},
    ("phi3", V4): {"default"},
    ("gpt_oss", "vllm"): {"yarn"},
    ("deepseek_v3", "vllm"): {"default", "yarn"},
    ("deepseek_v3", "sglang"): {"default", "yarn"},
    ("ministral3", "sglang"): set(),
}
"""The types that a reader computes of a family, where it does not compute all that Transformers 5 does."""


def make(family, arrival):
    name, values = FAMILIES[family]
    stated = {"rope_theta": 50000.0, **ARRIVALS[arrival]}
    if arrival == "longrope":
        stated |= {key: [1.0 + index for index in range(8)] for key in ("short_factor", "long_factor")}
    torch.manual_seed(0)
    values = copy.deepcopy({**values, "rope_parameters": stated if ARRIVALS[arrival] else None})
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).eval()


def agree(reader, config, module, length):
    inv_freq, attention_factor, served = reader(config)
    wanted = module.inv_freq.double()
    assert len(inv_freq) == len(wanted)
    assert torch.allclose(torch.tensor(inv_freq, dtype=torch.float64), wanted, rtol=2e-6, atol=1e-30)
    assert attention_factor == pytest.approx(module.attention_scaling, rel=2e-6)
    assert served == length


@pytest.mark.parametrize("target", [V4, *SERVERS])
@pytest.mark.parametrize(("method", "family", "arrival"), PATCHED)
def test_every_export_is_read_back_or_refused(method, family, arrival, target, tmp_path):
    model = make(family, arrival)
    if method is not None:
        rope_scaling.patch(model, method, factor=4)
    config, taken = model.config, TAKEN.get((family, target))
    if taken is not None and config.rope_parameters["rope_type"] not in taken:
        with pytest.raises(RopeScalingError, match=r"nearest that can be exported|Export 'yarn'|Export it to 'vllm'"):
            rope_scaling.export(model, tmp_path / "out", target)
        assert not list(tmp_path.iterdir())
        return
    folder = rope_scaling.export(model, tmp_path / "out", target)
    saved = json.loads((folder / "config.json").read_text())
    for reader in READERS[target]:
        agree(reader, saved, rotary(model), config.max_position_embeddings)
    assert close(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))
    diagnosis = diagnose(str(folder), targets=target)
    assert diagnosis.healthy, diagnosis


@pytest.mark.parametrize(("family", "arrival"), CASES)
def test_every_export_to_transformers_is_healthy(family, arrival, tmp_path):
    if arrival == "yarn, finetuned":
        pytest.skip("a key of the checkpoint's own, which stays")
    model = rope_scaling.patch(make(family, arrival), "yarn", factor=4)
    folder = rope_scaling.export(model, tmp_path / "out", "transformers")
    assert close(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))
    diagnosis = diagnose(str(folder), targets="transformers")
    assert diagnosis.healthy, diagnosis


@pytest.mark.parametrize("arrival", ["half rotated", "all rotated", "as the class has it"])
def test_gpt_neox_for_transformers_4_in_every_further_save(arrival, tmp_path):
    model = rope_scaling.patch(make("gpt_neox", arrival), "ntk", factor=4)
    rope_scaling.export(model, tmp_path / "0", V4)
    for number in (1, 2):
        again = rope_scaling.from_pretrained(tmp_path / str(number - 1))
        again.save_pretrained(tmp_path / str(number))
        saved = json.loads((tmp_path / str(number) / "config.json").read_text())
        agree(transformers_v4, saved, rotary(model), 256)


@pytest.mark.parametrize(("family", "method"), [("phi3", None), ("phi3", "longrope"), ("olmo", "linear")])
def test_strict_config_classes_of_transformers_4_get_the_keys_that_they_take(family, method, tmp_path):
    model = make(family, "default")
    if method == "longrope":
        rope_scaling.patch(model, "longrope", factor=4, long_factor=[1.0 + index for index in range(8)])
    elif method == "linear":
        rope_scaling.patch(model, "linear", factor=4)
    rope_scaling.export(model, tmp_path / "0", V4)
    again = rope_scaling.from_pretrained(tmp_path / "0")
    again.save_pretrained(tmp_path / "1")
    for folder in ("0", "1"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        agree(transformers_v4, saved, rotary(model), model.config.max_position_embeddings)
    if method == "linear":
        rope_scaling.patch(again, "linear", factor=2)
        again.save_pretrained(tmp_path / "patched")
        assert close(logits(rope_scaling.from_pretrained(tmp_path / "patched")), logits(again))


@pytest.mark.parametrize("position", [10, TRAINED_LENGTH, 200])
def test_the_query_scale_of_ministral_3_reaches_vllm(position, tmp_path):
    model = rope_scaling.patch(make("ministral3", "query scale"), "yarn", factor=4)
    folder = rope_scaling.export(model, tmp_path / "out", "vllm")
    saved = json.loads((folder / "config.json").read_text())
    positions = torch.tensor([[position]])
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    live = get_llama_4_attn_scale(positions, 0.1, model.config.rope_parameters["original_max_position_embeddings"])
    assert query_scale(saved, position) == pytest.approx(live.item(), rel=1e-6)
    rope_scaling.unpatch(model).save_pretrained(tmp_path / "plain")
    said = str(diagnose(str(tmp_path / "plain"), targets="vllm"))
    assert "RS302" in said and "`llama_4_scaling`" in " ".join(said.split())
    with pytest.raises(
        RopeScalingError, match="position over the trained length, so their logits differ. Export it to"
    ):
        rope_scaling.config_overrides(model, "sglang")


@pytest.mark.parametrize("target", [V4, *SERVERS])
@pytest.mark.parametrize("method", ["yarn", "ntk", "resonance", "mrrope_pro"])
def test_a_given_trained_length_is_written_in_every_form(method, target, tmp_path):
    model = make("qwen3", "default")
    arguments = {"wrapped": "yarn"} if method == "resonance" else {}
    rope_scaling.patch(model, method, factor=4, original_max_position_embeddings=48, **arguments)
    for attention_factor in (None, 1.0):
        if method == "yarn" and attention_factor:
            rope_scaling.patch(model, "yarn", factor=4, original_max_position_embeddings=48, attention_factor=1.0)
        folder = rope_scaling.export(model, tmp_path / str(attention_factor), target)
        saved = json.loads((folder / "config.json").read_text())
        for reader in READERS[target]:
            agree(reader, saved, rotary(model), 192)
        stated = re.findall(r'"original_max_position_embeddings": (\d+)', json.dumps(saved))
        assert set(stated) <= {"48"} and (stated or method == "ntk")
        assert diagnose(str(folder), targets=target).healthy


_SEES = {"depth": 1, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32}
_IMAGES = {
    "Qwen2_5_VL": (
        {"mrope_section": [2, 3, 3]},
        {**_SEES, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [0]},
    ),
    "Qwen3VL": (
        {"mrope_section": [2, 3, 3], "mrope_interleaved": True},
        {**_SEES, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}
_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def make_sectioned(family, **stated):
    text, vision = _IMAGES[family]
    rope = {"rope_type": "default", "rope_theta": 50000.0, **text, **stated}
    values = {**_GROUPED, "head_dim": 16, "rope_parameters": rope}
    config = getattr(transformers, f"{family}Config")(text_config=values, vision_config=vision, **_TOKENS)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def text_rotary(model):
    return next(m for n, m in model.named_modules() if n.endswith("language_model.rotary_emb"))


@pytest.mark.parametrize("target", ["transformers", V4, *SERVERS])
@pytest.mark.parametrize("method", [None, "yarn", "ntk", "mrrope_pro"])
@pytest.mark.parametrize(
    ("family", "arrival"), [("Qwen2_5_VL", "default"), ("Qwen3VL", "default"), ("Qwen2_5_VL", "yarn")]
)
def test_sections_are_kept_where_a_reader_rotates_by_them(family, arrival, method, target, tmp_path, recwarn):
    model = make_sectioned(family, **ARRIVALS[arrival])
    if method is not None:
        rope_scaling.patch(model, method, factor=4)
    text = model.config.text_config
    kind = text.rope_parameters["rope_type"]
    if target in SERVERS and kind == "longrope":
        with pytest.raises(RopeScalingError, match=r"rotation has sections .* nearest that can be exported: 'yarn'"):
            rope_scaling.export(model, tmp_path / "out", target)
        return
    saved = json.loads((rope_scaling.export(model, tmp_path / "out", target) / "config.json").read_text())
    assert not {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"} & saved.keys()
    saved = saved["text_config"]
    otherwise = target == "vllm" and kind == "yarn" and family == "Qwen2_5_VL"
    for reader in READERS.get(target, []):
        assert sections(saved) == [2, 3, 3]
        if not otherwise:
            agree(reader, saved, text_rotary(model), text.max_position_embeddings)
    assert otherwise == any("for four times the trained length" in str(one.message) for one in recwarn)
    if otherwise:  # as long as vLLM does
        with pytest.raises(AssertionError):
            agree(vllm, saved, text_rotary(model), text.max_position_embeddings)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(text_rotary(again).inv_freq, text_rotary(model).inv_freq)
    assert again.config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]


@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("method", ["yarn", "ntk", "mrrope_pro"])
@pytest.mark.parametrize(
    ("family", "arrival"),
    [("qwen3", "default"), ("llama", "llama3"), ("llama", "linear"), ("phi", "half rotated"), ("Qwen3VL", "default")],
)
def test_overrides_as_servers_set_them(family, arrival, method, target):
    if family == "Qwen3VL":
        model, of = make_sectioned(family), text_rotary
        method = "yarn" if method == "mrrope_pro" else method
    else:
        model, of = make(family, arrival), rotary
    base = copy.deepcopy(model.config)
    overrides = json.loads(
        json.dumps(rope_scaling.config_overrides(rope_scaling.patch(model, method, factor=4), target))
    )
    length = model.config.get_text_config().max_position_embeddings
    agree(lambda config: overridden(config, overrides, target), base, of(model), length)


def make_gemma3(**full):
    parts = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0, **full},
    }
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**_GROUPED, **types, head_dim=16, rope_parameters=parts)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("target", [V4, *SERVERS])
@pytest.mark.parametrize("method", [None, "yarn", "ntk", "mrrope_pro"])
@pytest.mark.parametrize("arrival", ["default", "linear"])
def test_layer_types_of_gemma_3(arrival, method, target, tmp_path):
    model = make_gemma3(**ARRIVALS[arrival])
    base = copy.deepcopy(model.config)
    if method is not None:
        rope_scaling.patch(model, method, factor=4)
    folder = rope_scaling.export(model, tmp_path / "out", target)
    saved, module = json.loads((folder / "config.json").read_text()), rotary(model)
    for reader in READERS[target]:
        for kind in ("sliding_attention", "full_attention"):
            inv_freq, attention_factor, served = reader(of_layer_type(saved, kind))
            wanted = getattr(module, f"{kind}_inv_freq").double()
            assert torch.allclose(torch.tensor(inv_freq, dtype=torch.float64), wanted, rtol=2e-6)
            assert attention_factor == pytest.approx(getattr(module, f"{kind}_attention_scaling"), rel=2e-6)
            assert served == model.config.max_position_embeddings
    assert close(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(model))
    assert diagnose(str(folder), targets=target).healthy, diagnose(str(folder), targets=target)
    if target in SERVERS:
        overrides = rope_scaling.config_overrides(model, target)
        overridden(base, overrides, target)
        assert json.loads(json.dumps(base.rope_parameters)) == saved["rope_parameters"]
    else:
        again = rope_scaling.from_pretrained(folder)
        again.save_pretrained(tmp_path / "again")
        both = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
        for key in ("rope_theta", "rope_scaling", "rope_local_base_freq", "rope_parameters"):
            assert both[0][key] == both[1][key]


def test_layer_types_that_have_no_keys_elsewhere(tmp_path):
    model = rope_scaling.patch(make_gemma3(), "yarn", factor=4, layer_types="all")
    for target in (V4, *SERVERS, "llama.cpp"):
        with pytest.raises(RopeScalingError, match="has no keys for these settings. Export it to 'transformers', and"):
            rope_scaling.export(model, tmp_path / "out", target)
    model.save_pretrained(tmp_path / "saved")
    assert "RS303" in str(diagnose(str(tmp_path / "saved"), targets="vllm"))
    plain = make_gemma3()
    plain.save_pretrained(tmp_path / "plain")
    said = str(diagnose(str(tmp_path / "plain"), targets=V4))
    assert "RS301" in said and "base 50000, base 20000" in said


def test_a_config_without_a_length():
    values = {key: value for key, value in _GROUPED.items() if key != "max_position_embeddings"}
    config = transformers.RecurrentGemmaConfig(**{**values, "num_hidden_layers": 3}, lru_width=64)
    with pytest.raises(RopeScalingError, match="states no `max_position_embeddings`, up to which vLLM serves a model"):
        rope_scaling.config_overrides(AutoModelForCausalLM.from_config(config), "vllm")


def test_a_text_config_two_levels_down():
    inner = rope_scaling.patch(make_sectioned("Qwen3VL"), "ntk", factor=4)
    outer = torch.nn.Module()
    outer.thinker, outer.config = inner, transformers.PreTrainedConfig()
    outer.config.thinker_config = inner.config
    overrides = rope_scaling.config_overrides(outer, "vllm")
    assert overrides["thinker_config"]["text_config"] == rope_scaling.config_overrides(inner, "vllm")["text_config"]
    with pytest.raises(RopeScalingError, match=r"one level .* is `thinker_config.text_config`. Export a folder"):
        rope_scaling.config_overrides(outer, "sglang")


@pytest.mark.parametrize("target", SERVERS)
def test_factors_that_follow_the_length_of_a_text(target, tmp_path):
    name, values = FAMILIES["phi3"]
    lists = {"short_factor": [1.0] * 8, "long_factor": [4.0 + index for index in range(8)]}
    stated = {"rope_type": "longrope", "rope_theta": 10000.0, **lists}
    values = {**values, "max_position_embeddings": 4 * TRAINED_LENGTH, "rope_parameters": stated}
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).eval()
    with pytest.raises(
        RopeScalingError, match="takes one of them for all. Patch it: 'longrope' with its `long_factor`"
    ):
        rope_scaling.export(model, tmp_path / "out", target)
    rope_scaling.patch(model, "ntk", factor=2)
    saved = json.loads((rope_scaling.export(model, tmp_path / "out", target) / "config.json").read_text())
    agree(READERS[target][0], saved, rotary(model), 8 * TRAINED_LENGTH)
