"""`describe` says what is in effect, in numbers read back from the module."""

import dataclasses

import pytest
import torch
from conftest import logits, make_model, rotary

import rope_scaling
from rope_scaling.hf.describe import read_description


def described(model, capsys, **arguments):
    description = rope_scaling.describe(model, **arguments)
    printed = capsys.readouterr().out
    assert printed.startswith(str(description))
    return printed


def test_unpatched(llama, capsys):
    text = described(llama, capsys)
    assert (
        "LlamaForCausalLM" in text
        and "model.rotary_emb: not patched" in text
        and "64 trained, 64 as loaded, 64 now" in text
    )


def test_patched(llama, capsys):
    rope_scaling.patch(llama, "yarn", factor=4, beta_fast=16)
    text = described(llama, capsys)
    assert "model.rotary_emb: yarn:factor=4,beta_fast=16" in text
    assert "64 trained, 64 as loaded, 256 now" in text
    assert "attention factor  1.13863" in text
    assert "8 pairs, torch.float32" in text
    assert "plain Transformers reloads it, as rope_type 'yarn'" in text


def test_pair_table(llama, capsys):
    rope_scaling.patch(llama, "p_rope", partial_rotary_factor=0.5)
    lines = described(llama, capsys, pairs=True).splitlines()
    table = [line for line in lines if line.strip()[:1].isdigit()]
    assert len(table) == 8
    assert table[0].split()[1:3] == ["6.28", "6.28"]
    assert "stopped" in table[-1]


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("qwen2-yarn", "yarn", "loaded with yarn x4 over 64 tokens; x2 more makes yarn x8 over 64 tokens"),
        ("llama3.1", "llama3", "loaded with llama3 x8 over 64 tokens; x2 more makes llama3 x16 over 64 tokens"),
        (
            "llama3.1",
            "yarn",
            "loaded with llama3 for 512 tokens; kept, and multiplied pair by pair with what yarn "
            "does to a model trained at 512 tokens",
        ),
    ],
)
def test_arithmetic_on_models_that_arrive_scaled(family, method, expected, capsys):
    assert expected in described(rope_scaling.patch(make_model(family), method, factor=2), capsys)


def test_arrived_scaling_is_named(capsys):
    assert "not patched; loaded with llama3:factor=8" in described(make_model("llama3.1"), capsys)


def test_layer_types_that_are_left_alone(capsys):
    text = described(rope_scaling.patch(make_model("gemma3"), "linear", factor=4), capsys)
    assert "model.rotary_emb (full_attention): linear:factor=4" in text
    assert "untouched         sliding_attention" in text


def test_saved_patch(llama, tmp_path, capsys):
    rope_scaling.patch(llama, "mrrope_pro", factor=4).save_pretrained(tmp_path)
    assert "saved with mrrope_pro; `patch(model)` makes it live" in described(
        type(llama).from_pretrained(tmp_path), capsys
    )


def test_numbers_are_read_back_from_the_module(llama):
    rope_scaling.patch(llama, "yarn", factor=4)
    rotary(llama).inv_freq.fill_(0.5)
    (slot,) = rope_scaling.describe(llama).slots
    assert torch.equal(slot.inv_freq, torch.full((8,), 0.5))
    assert repr(rope_scaling.describe(llama)) == "<Description of LlamaForCausalLM: yarn:factor=4>"


def test_spans_and_their_reach(llama, capsys):
    text = described(rope_scaling.patch(llama, rope_scaling.SelfExtend(group_size=4), rope_scaling.LogN()), capsys)
    assert "self_extend:group_size=4 + log_n" in text and "up to 160 tokens" in text
    assert "plain Transformers refuses it; rope_scaling.from_pretrained loads it" in text
    assert "any length" in described(rope_scaling.patch(llama, "rerope"), capsys)


def wrapped_by_peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def merged(model):
    return wrapped_by_peft(model).merge_and_unload()


def with_an_adapter(model):
    from peft import LoraConfig

    try:
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(str(error))  # Transformers asks for a newer PEFT
    return model


WRAPPERS = {
    "peft": wrapped_by_peft,
    "merged": merged,
    "adapter": with_an_adapter,
    "compiled": torch.compile,
    "sequential": torch.nn.Sequential,
    "twice": lambda model: torch.nn.Sequential(torch.compile(wrapped_by_peft(model))),
}


def test_a_description_can_be_read_without_printing(llama, capsys):
    rope_scaling.patch(llama, "yarn", factor=4)
    description = rope_scaling.read_description(llama)
    assert not capsys.readouterr().out
    assert str(rope_scaling.describe(llama)) == str(description)
    with pytest.raises(dataclasses.FrozenInstanceError):
        description.model = "another"


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(("method", "arguments"), [("yarn", {"factor": 4}), ("rerope", {})])
def test_however_the_model_is_wrapped(wrap, method, arguments):
    """Wrapped after the patch or before it, and the patch taken back through the wrapper or from inside."""
    before = make_model("llama")
    plain = logits(before)
    after = rope_scaling.patch(WRAPPERS[wrap](make_model("llama")), method, **arguments)
    rope_scaling.patch(before, method, **arguments)
    inner = before
    before = WRAPPERS[wrap](before)
    for model in (before, after):
        (slot,) = read_description(model).slots
        assert slot.method.startswith(method) and slot.target_length >= 64
        assert ("up to" in slot.arithmetic or "any length" in slot.arithmetic) == (method == "rerope")
    rope_scaling.patch(before, "yarn", factor=2)
    assert read_description(before).slots[0].method == "yarn:factor=2"
    rope_scaling.unpatch(before)
    if wrap in ("compiled", "sequential"):
        assert torch.equal(logits(inner), plain)
