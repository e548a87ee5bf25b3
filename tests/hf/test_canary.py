"""What this library stands on in Transformers. A release that moves it fails here first, and says what moved."""

import inspect

import pytest
import torch
import transformers
from conftest import make_model, other_family, token_ids
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rope_scaling.hf import compat
from rope_scaling.hf.compat import CACHE_NAME


def test_types_of_scaling():
    known = {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
    assert set(compat.rope_functions()) == known, "a new type to extend from, export and diagnose, or one that is gone"


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
    assert compat.is_registered_attention("canary") and compat.has_mask_function("canary")
    assert not compat.is_registered_attention("nothing") and not compat.has_mask_function("nothing")
    model = make_model("llama")
    model.set_attn_implementation("canary")
    assert compat.attention_implementation(model.config) == "canary"
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


def test_the_cache_has_one_of_two_names():
    model = make_model("llama").model
    assert compat.cache_argument(model) == CACHE_NAME in inspect.signature(model.forward).parameters
    assert CACHE_NAME in model(token_ids(5), use_cache=True), "the output has it under another name"


def test_stock_attention_and_masks():
    names = inspect.signature(compat.sdpa_attention_forward).parameters
    assert {"module", "query", "key", "value", "attention_mask", "dropout", "scaling"} <= set(names)
    names = inspect.signature(compat.sdpa_mask).parameters
    assert {"mask_function", "attention_mask", "allow_is_bidirectional_skip"} <= set(names)
    first, second = (lambda row, head, query, key: query >= key), (lambda row, head, query, key: query < key + 2)
    both = compat.and_masks(first, second)
    index = [torch.tensor(value) for value in (0, 0, 3)]
    assert bool(both(*index, torch.tensor(2))) and not bool(both(*index, torch.tensor(1)))


def test_patterns_over_the_causal_mask_say_so():
    """`no_mask` refuses `use_vmap`, and reads the window from `local_size`."""
    from transformers import masking_utils

    assert "use_vmap" in inspect.getsource(masking_utils.create_causal_mask)
    assert "local_size" in inspect.getsource(masking_utils.create_sliding_window_causal_mask)


def test_latent_attention_computes_its_multiplier_when_it_is_built():
    shape = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = other_family("DeepseekV3Config", num_hidden_layers=1, num_key_value_heads=4, **shape, **experts)
    attention = model.model.layers[0].self_attn
    before = attention.scaling
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    compat.scale_softmax(model.model, None, yarn)
    assert attention.scaling > before, "`yarn_apply_mscale`, `scaling` or `qk_head_dim` has another name"


def test_configs_name_the_keys_that_they_read_without_a_check():
    from transformers import Qwen2VLTextConfig

    assert "mrope_section" in compat.ignored_rope_keys(Qwen2VLTextConfig())


def test_layers_that_differ_have_configs_of_their_own():
    config = LlamaConfig(num_hidden_layers=3)
    assert compat.layer_configs(config) == [config] * 3 and not compat.layers_differ(config)
    if "gemma4_text" in transformers.CONFIG_MAPPING:
        shape = {"num_hidden_layers": 2, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
        config = AutoConfig.for_model("gemma4_text", **shape, per_layer_config={"1": {"head_dim": 32}})
        assert compat.layers_differ(config)
        assert [layer.head_dim for layer in compat.layer_configs(config)] == [16, 32]
        assert compat.layer_type_config(config, "full_attention").head_dim == 32


def test_torch_says_when_it_exports():
    assert compat.is_exporting() is False


def test_the_class_of_a_model():
    from transformers import LlamaForCausalLM

    assert next(compat.auto_model_classes(LlamaConfig())) is LlamaForCausalLM
    assert isinstance(compat.build_model(LlamaForCausalLM, make_model("llama").config), LlamaForCausalLM)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.optional_file(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert compat.optional_file(str(tmp_path), "tokenizer_config.json") is None


def test_the_newest_version_that_was_tried():
    """Not an error in itself: the families want to be tried again (`make families`), and this line moved on."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if (major, minor) > (5, 24):
        pytest.fail(f"Transformers {transformers.__version__} is newer than what was tried; see CONTRIBUTING.md.")
