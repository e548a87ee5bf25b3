"""What this library stands on in Transformers. A release that moves it fails here first, and says what moved."""

import inspect

import pytest
import torch
import transformers
from conftest import make_model, token_ids
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rope_scaling.hf.compat import CACHE_NAME


def test_types_of_scaling():
    known = {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
    assert set(ROPE_INIT_FUNCTIONS) == known, "a new type to extend from, export and diagnose, or one that is gone"


def test_rotary_modules():
    module = make_model("llama").model.rotary_emb
    assert {"inv_freq", "original_inv_freq"} <= set(module._buffers) and module.inv_freq.dtype == torch.float32
    assert module.rope_type == "default" and module.attention_scaling == 1.0 and module.config.rope_parameters
    inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(module.config)
    assert torch.equal(inv_freq, module.inv_freq) and factor == 1.0
    layered = make_model("gemma3").model.rotary_emb
    assert set(layered.rope_type) == {"full_attention", "sliding_attention"}
    assert hasattr(layered, "full_attention_inv_freq") and hasattr(layered, "full_attention_attention_scaling")


def test_buffers_are_filled_by_the_names_they_have():
    module = make_model("llama").model.rotary_emb
    wanted = module.inv_freq.clone()
    module.inv_freq.fill_(0.0)
    make_model("llama")._init_weights(module)
    assert torch.equal(module.inv_freq, wanted)


def test_configs_move_the_older_keys_into_one():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}
    config = AutoConfig.for_model("phi", **old)
    wanted = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    assert {key: config.rope_parameters[key] for key in wanted} == wanted
    assert "rope_scaling" not in config.to_dict() and "rope_theta" not in config.to_dict()


def test_how_attention_and_masks_are_asked_for():
    heard = {}

    def attention(module, query, key, value, attention_mask, **kwargs):
        heard["attention"] = {**kwargs, "mask": attention_mask, "layer": module.layer_idx}
        return query.transpose(1, 2), None

    def mask(**kwargs):
        heard["mask"] = kwargs
        return kwargs["attention_mask"]

    AttentionInterface.register("canary", attention)
    AttentionMaskInterface.register("canary", mask)
    assert "canary" in AttentionInterface._global_mapping and "canary" in ALL_MASK_ATTENTION_FUNCTIONS
    model = make_model("llama")
    model.set_attn_implementation("canary")
    padding = torch.ones(1, 5, dtype=torch.long)
    model(token_ids(5), attention_mask=padding, passed_on="to attention")
    assert {"scaling", "dropout", "passed_on"} <= heard["attention"].keys() and heard["attention"]["layer"] == 1
    assert heard["attention"]["mask"].equal(padding.bool())
    assert {"mask_function", "q_length", "kv_length", "attention_mask"} <= heard["mask"].keys()


def test_caches():
    model, cache = make_model("llama"), DynamicCache()
    model(token_ids(5), **{CACHE_NAME: cache})
    layer = cache.layers[0]
    assert layer.keys.shape == (1, 2, 5, 16) and cache.get_seq_length() == layer.get_seq_length() == 5
    assert list(inspect.signature(layer.update).parameters)[:2] == ["key_states", "value_states"]


def test_the_newest_version_that_was_tried():
    """Not an error in itself: the families want to be tried again (`make families`), and this line moved on."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if (major, minor) > (5, 24):
        pytest.fail(f"Transformers {transformers.__version__} is newer than what was tried; see CONTRIBUTING.md.")
