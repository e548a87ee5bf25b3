"""A patch goes one way: a checkpoint is read, the arguments are parsed, a plan is made of both, and applied."""

import copy

import pytest
import torch
from conftest import logits, make_model, rotary, same_state, state

import rope_scaling
from rope_scaling import LogN, ReRope, RopeScalingError, Yarn
from rope_scaling.hf import model_patch
from rope_scaling.hf.checkpoint import read_checkpoint
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.model_patch import applied_patch
from rope_scaling.hf.patch_arguments import PatchArguments
from rope_scaling.hf.patch_plan import plan_patch


def plan(model, *method, **arguments):
    return plan_patch(read_checkpoint(model), PatchArguments.parse(*method, **arguments))


@pytest.mark.parametrize("method", [Yarn(factor=4), ReRope()])
def test_a_plan_changes_nothing_and_applied_it_is_the_patch(method):
    model, patched = make_model("llama"), rope_scaling.patch(make_model("llama"), method)
    before = state(model)
    planned = plan(model, method)
    assert same_state(state(model), before)
    assert planned.record == rope_scaling.hf.patch.patch_record(patched)
    planned.apply(model)
    assert torch.equal(logits(model), logits(patched)) and str(model.config) == str(patched.config)
    planned.revert(model)
    assert same_state(state(model), before)


@pytest.mark.parametrize("method", [ReRope(), LogN()])
def test_without_a_frequency_method_nothing_is_rescaled(method):
    (change,) = plan(make_model("llama"), method).slots.values()
    assert change.rescaling is None and change.inv_freq is change.pretrained.inv_freq


def test_reverting_needs_a_patch():
    planned = plan(make_model("llama"), "yarn", factor=4)
    with pytest.raises(RopeScalingError, match="not patched: there is nothing to revert"):
        planned.revert(make_model("llama"))


def test_a_plan_for_other_modules_is_refused():
    model = make_model("llama")
    before, planned = state(model), plan(model, "yarn", factor=4)
    with pytest.raises(RopeScalingError, match=r"planned for another model: LlamaModel has no .*`model.rotary_emb`"):
        planned.apply(model.model)
    assert same_state(state(model), before)


def test_one_plan_for_several_models_alike():
    first, second = make_model("llama"), make_model("llama")
    planned = plan(first, "yarn", factor=4)
    planned.apply(first)
    planned.apply(second)
    assert torch.equal(logits(first), logits(second))
    planned.revert(first)
    assert "_rope_scaling" not in vars(rotary(first)) and rotary(second).inv_freq.equal(
        rotary(rope_scaling.patch(first, "yarn", factor=4)).inv_freq
    )


def test_one_attribute_holds_the_state_and_the_config_its_record():
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    patch = applied_patch(read_checkpoint(model).slots)
    assert vars(rotary(model))["_rope_scaling"].patch.record == patch.record == getattr(model.config, RECORD_KEY)
    again = PatchArguments.from_record(patch.record)
    assert again.methods == patch.methods == (Yarn(factor=4),) and again.target_length == 256


def test_a_checkpoint_is_what_was_loaded_whatever_is_in_effect():
    plain, patched = make_model("qwen2-yarn"), rope_scaling.patch(make_model("qwen2-yarn"), "yarn", factor=2)
    for model in (plain, patched):
        checkpoint = read_checkpoint(model)
        (slot,) = checkpoint.slots
        assert checkpoint.rope(slot).reach == 256 and checkpoint.rope(slot).method == Yarn(factor=4)
        assert checkpoint.settings["rope_parameters"]["factor"] == 4
    assert (read_checkpoint(plain).record is None) == (read_checkpoint(patched).record is not None)


def test_a_checkpoint_of_a_config_alone():
    model = make_model("gemma3")
    of_model, of_config = read_checkpoint(model), read_checkpoint(copy.deepcopy(model.config))
    assert of_config.layer_types == of_model.layer_types == ("full_attention", "sliding_attention")
    for one, other in zip(of_model.slots, of_config.slots, strict=True):
        assert torch.equal(of_model.rope(one).inv_freq, of_config.rope(other).inv_freq)
    patch = plan_patch(of_config, PatchArguments.parse("linear", factor=4))
    assert list(patch.slots) == [("model.rotary_emb", "full_attention")]


def test_a_trained_length_that_the_config_does_not_have():
    checkpoint = read_checkpoint(make_model("llama"), original_max_position_embeddings=32)
    assert checkpoint.rope(checkpoint.slots[0]).reach == 32
    assert checkpoint.trained_at(None).rope(checkpoint.slots[0]).reach == 64


def test_a_plan_that_fails_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = make_model("llama")
    before, planned = state(model), plan(model, "rerope")
    monkeypatch.setattr(model_patch, "guard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        planned.apply(model)
    assert same_state(state(model), before) and not model.model._forward_pre_hooks


@pytest.mark.parametrize(("method", "arguments"), [("yarn", {"factor": 4}), ("rerope", {})])
def test_patching_again_helps_where_a_rotary_module_was_replaced(method, arguments):
    """As the error of the next call advises."""
    model, wanted = make_model("llama"), logits(rope_scaling.patch(make_model("llama"), method, **arguments))
    plain = logits(model)
    rope_scaling.patch(model, method, **arguments)
    model.model.rotary_emb = type(rotary(make_model("llama")))(model.config)
    with pytest.raises(RopeScalingError, match="Patch the model again"):
        logits(model)
    assert torch.equal(logits(rope_scaling.patch(model, method, **arguments)), wanted)
    assert torch.equal(logits(rope_scaling.unpatch(model)), plain) and not hasattr(model.config, RECORD_KEY)
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (("yarn",), {"factor": 2, "target_length": 99}, "Give `factor` or `target_length`, not both"),
        (("yarn",), {"factor": 0.5}, "`factor` must be a finite number, at least 1"),
        (("yarn",), {"target_length": "far"}, "`target_length`"),
        ((Yarn,), {}, "`method` must be a name such as 'yarn' or a method object"),
        ((Yarn(factor=2),), {"beta_fast": 16}, "a method object carries its own fields"),
        ((Yarn(factor=2),), {"factor": 4}, "`factor` is 4, but the method has 2"),
        (("yarn", "log_n"), {}, "A name stands for one method"),
        (([],), {}, "No method given"),
    ],
)
def test_arguments_are_refused_before_any_model_is_read(method, arguments, message):
    with pytest.raises(RopeScalingError, match=message):
        PatchArguments.parse(*method, **arguments)
