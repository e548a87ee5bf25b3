"""Patched models inside PEFT, accelerate, data parallelism and `torch.compile`."""

import pytest
import torch
from conftest import FAMILIES, close, logits, make_model, rotary, token_ids

import rope_scaling
from cases import arguments_of
from rope_scaling.frequencies import METHODS


def test_peft_patched_before_or_after_wrapping(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    after = get_peft_model(make_model("llama"), lora)
    plain = logits(after)
    rope_scaling.patch(after, "yarn", factor=4)
    torch.manual_seed(1)
    before = get_peft_model(rope_scaling.patch(make_model("llama"), "yarn", factor=4), lora)
    assert close(logits(after), logits(before))
    assert not torch.equal(logits(after), plain)

    merged = after.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert close(logits(loaded), logits(merged))


def test_accelerate_prepared():
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(make_model("llama"))
    assert close(logits(rope_scaling.patch(prepared, "yarn", factor=4)), _expected())


def test_accelerate_dispatched_with_offload(tmp_path):
    from accelerate import dispatch_model

    model = make_model("llama")
    devices = {name: "cpu" for name, _ in model.named_children()}
    model = dispatch_model(
        model, devices | {"model": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert close(logits(rope_scaling.patch(model, "yarn", factor=4)), _expected())


def test_wrapped_in_another_module():
    wrapper = torch.nn.Sequential(make_model("llama"))
    rope_scaling.patch(wrapper, "yarn", factor=4)
    assert close(logits(wrapper[0]), _expected())
    assert wrapper[0].config.rope_parameters["rope_type"] == "yarn"


def test_automatic_mixed_precision_keeps_frequencies_float32():
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert rotary(model).inv_freq.dtype == torch.float32


def _expected():
    return logits(rope_scaling.patch(make_model("llama"), "yarn", factor=4))


@pytest.mark.parametrize("name", METHODS)
def test_compiles_whole_and_does_not_recompile_as_the_length_grows(name):
    torch._dynamo.reset()
    model = rope_scaling.patch(make_model("llama"), name, **arguments_of(name, 8))
    wanted = [logits(model, token_ids(length), use_cache=False) for length in (80, 96, 113, 150, 255)]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    # The first length is compiled for; every other one must run what is there.
    found = [logits(compiled, token_ids(80), use_cache=False)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [logits(compiled, token_ids(length), use_cache=False) for length in (96, 113, 150, 255)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))


def test_compiles_with_the_default_compiler():
    torch._dynamo.reset()
    model = rope_scaling.patch(make_model("llama", num_hidden_layers=1), "yarn", factor=4)
    wanted = logits(model, use_cache=False)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(logits(compiled, use_cache=False), wanted, atol=1e-4)


def test_compiled_models_take_a_new_patch():
    torch._dynamo.reset()
    compiled = torch.compile(make_model("llama"), fullgraph=True, backend="eager")
    logits(compiled, use_cache=False)
    rope_scaling.patch(compiled, "yarn", factor=4)
    assert torch.allclose(logits(compiled, use_cache=False), _expected(), atol=1e-5)


@pytest.mark.parametrize("family", ["Gemma3", "Llava"])
def test_the_text_decoder_of_a_vision_language_model(family, tmp_path):
    import transformers

    kind = {"Gemma3": "gemma3_text", "Llava": "llama"}[family]
    text = FAMILIES["gemma3" if family == "Gemma3" else "llama"][1]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    vision |= {"model_type": "clip_vision_model", "projection_dim": 16} if family == "Llava" else {}
    config = getattr(transformers, f"{family}Config")(
        text_config=text | {"model_type": kind}, vision_config=vision, image_token_index=60
    )
    cls = getattr(transformers, f"{family}ForConditionalGeneration")
    torch.manual_seed(0)
    model, ids = cls(config).eval(), token_ids(150) % 50
    original = logits(model, ids)
    rope_scaling.patch(model, "mrrope_pro", factor=4).save_pretrained(tmp_path)
    patched = logits(model, ids)
    assert not torch.equal(patched, original)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert close(logits(loaded, ids), patched)
    assert close(logits(rope_scaling.unpatch(loaded), ids), original)
