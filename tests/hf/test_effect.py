"""A patch that the model cannot feel is refused, and one that nothing far away feels is warned of."""

import warnings

import pytest
import torch
import transformers
from conftest import TRAINED_LENGTH, logits, make_model, other_family

import rope_scaling
from rope_scaling import RopeScalingError


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}


def falcon(**changes):
    torch.manual_seed(0)
    config = transformers.FalconConfig(**SIZES, **changes)
    return transformers.FalconForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("method", "arguments"), [("yarn", {"factor": 4}), ("ntk", {"factor": 2}), ("linear", {"factor": 2})]
)
def test_a_rotary_module_that_nothing_uses(method, arguments):
    model = falcon(alibi=True, multi_query=False, new_decoder_architecture=False)
    before = logits(model)
    with pytest.raises(RopeScalingError, match="No layer of FalconModel rotates queries and keys.*ALiBi"):
        rope_scaling.patch(model, method, **arguments)
    assert torch.equal(logits(model), before) and not hasattr(model.config, "rope_scaling_patch")
    rotates = falcon(alibi=False)
    before = logits(rotates)
    assert not torch.equal(logits(rope_scaling.patch(rotates, method, **arguments)), before)


def windowed_rotary(types, window=16):
    """As Command R7B and Command A: layers with a window rotate, global ones do not."""
    return other_family("Cohere2Config", layer_types=types, num_hidden_layers=len(types), sliding_window=window)


def chunked_rotary():
    """As Llama 4: layers with chunks rotate, global ones do not."""
    return other_family(
        "Llama4TextConfig",
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
    )


@pytest.mark.parametrize("make", [lambda: windowed_rotary(["sliding_attention", "full_attention"]), chunked_rotary])
@pytest.mark.parametrize(("method", "arguments"), [("yarn", {"factor": 4}), ("rerope", {"window": 20})])
def test_only_layers_that_see_little_rotate(make, method, arguments):
    with pytest.warns(UserWarning, match="that see the whole text have no rotary embedding.*see 16 tokens") as seen:
        rope_scaling.patch(make(), method, **arguments)
    assert [one.filename for one in seen if "rotary embedding" in str(one.message)] == [__file__]


QUIET = {
    "all layers alike": lambda: make_model("llama"),
    "windows beside global layers that rotate": lambda: make_model("gemma3"),
    "some global layers do not rotate": lambda: other_family("SmolLM3Config"),
    "a window as long as the target": lambda: windowed_rotary(
        ["sliding_attention", "full_attention"], 4 * TRAINED_LENGTH
    ),
}


@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET)
def test_others_are_patched_without_a_word(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rope_scaling.patch(make(), "yarn", factor=4)
