"""A patched model knows that it is whole: what other code changes after the patch raises at the next forward call."""

import copy
import pickle

import pytest
import torch
import transformers
from conftest import close, logits, make_model, other_family, rotary, strong, token_ids
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.doctor import diagnose
from rope_scaling.hf.compat import CACHE_NAME


PATCHES = {
    "yarn": ("yarn", {"factor": 4}),
    "rerope": ("rerope", {"window": 20}),
    "log_n": ("log_n", {}),
    "sliding_window": ("sliding_window", {"window": 24}),
}
SPANS = ["rerope", "log_n", "sliding_window"]


def patched(name, model=None):
    method, arguments = PATCHES[name]
    return rope_scaling.patch(strong("llama") if model is None else model, method, **arguments)


def codes(model):
    return {finding.code for finding in diagnose(model).findings if finding.level != "note"}


def replace_rotary(model):
    model.model.rotary_emb = type(strong("llama").model.rotary_emb)(model.config)


def overwrite_buffer(model):
    rotary(model).inv_freq = rotary(model).inv_freq / 2


def write_into_buffer(model):
    rotary(model).inv_freq.mul_(0.5)


def change_factor(model):
    rotary(model).attention_scaling = 3.0


def change_type(model):
    rotary(model).rope_type = "dynamic"


def replace_config(model):
    model.config = LlamaConfig(**strong("llama").config.to_dict())


def edit_config(model):
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}


def forget_record(model):
    del model.config.rope_scaling_patch


def remove_hooks(model):
    for module in model.modules():
        module._forward_pre_hooks.clear()


def one_layer_has_another_config(model):
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    model.model.layers[1].self_attn.config = config


def set_attention(model):
    model.set_attn_implementation("sdpa")


def replace_attention_forward(model):
    """As kernels of other libraries do."""
    attention = model.model.layers[1].self_attn
    stock = strong("llama").model.layers[1].self_attn.forward

    def forward(*args, **kwargs):
        kwargs.pop("rope_scaling_call")
        return stock(*args, **kwargs)

    attention.forward = forward


BY_ALL = [
    replace_rotary,
    overwrite_buffer,
    write_into_buffer,
    change_factor,
    change_type,
    replace_config,
    edit_config,
    forget_record,
]
BY_SPANS = [set_attention, remove_hooks, one_layer_has_another_config]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in PATCHES for change in BY_ALL]
    + [(name, change) for name in SPANS for change in BY_SPANS],
)
def test_what_takes_the_patch_away_raises_and_is_found(name, change):
    model = patched(name)
    logits(model)
    assert diagnose(model).healthy
    change(model)
    with pytest.raises(RopeScalingError, match="patch"):
        logits(model)
    assert codes(model) & {"RS401", "RS405"}


@pytest.mark.parametrize("name", SPANS)
def test_attention_that_other_code_computes_raises(name):
    model = patched(name)
    replace_attention_forward(model)
    with pytest.raises(
        RopeScalingError, match=r"The attention of layer 1 .*`forward` was replaced, so .* had no effect"
    ):
        logits(model)


@pytest.mark.parametrize("name", SPANS)
def test_compiled_models_notice_too(name):
    model = patched(name)
    compiled = torch.compile(model, backend="eager")
    wanted = logits(model)
    assert close(logits(compiled), wanted)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RopeScalingError, match="was set to 'sdpa' after the patch"):
        logits(compiled)


def test_fewer_layers_in_an_early_exit():
    model = patched("rerope")
    model.config.num_hidden_layers = 1
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("change", [set_attention, replace_rotary, overwrite_buffer])
def test_the_way_out_that_the_error_names(name, change):
    model, plain = patched(name), logits(strong("llama"))
    wanted = logits(model)
    change(model)
    with pytest.raises(RopeScalingError, match=r"rope_scaling.patch\(model, \.\.\.\).*rope_scaling.unpatch\(model\)"):
        logits(model)
    if change is set_attention:
        assert torch.equal(logits(patched(name, model)), wanted)
        set_attention(model)
        assert torch.equal(logits(rope_scaling.unpatch(model)), plain)
        assert model.config._attn_implementation == "sdpa"


def test_attention_of_choice_is_kept_when_the_patch_goes():
    model = patched("rerope")
    model.set_attn_implementation("eager")
    assert rope_scaling.unpatch(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", PATCHES)
def test_what_changes_nothing_does_not_raise(name):
    """Other tensors of the same values, copies, another dtype: the patch is still in effect."""
    model = patched(name)
    wanted = logits(model)
    rotary(model).inv_freq = rotary(model).inv_freq.clone()
    model.config = copy.deepcopy(model.config)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert close(logits(pickle.loads(pickle.dumps(model))), wanted)
    model.load_state_dict(model.state_dict())
    model.config.max_position_embeddings, model.config.use_cache = 9999, False
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(logits(model), wanted) and diagnose(model).healthy


def test_weights_loaded_over_a_table_raise():
    """RoFormer's table is a parameter, so weights bring another."""
    model = make_roformer()
    state = copy.deepcopy(model.state_dict())
    rope_scaling.patch(model, "linear", factor=2)
    table = "roformer.encoder.embed_positions.weight"
    model.load_state_dict({**model.state_dict(), table: torch.cat([state[table]] * 2)})
    with pytest.raises(RopeScalingError, match="were overwritten after the patch"):
        model(token_ids(40))


def make_roformer():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "embedding_size": 64, "hidden_size": 64, "intermediate_size": 96}
    config = transformers.RoFormerConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, is_decoder=False
    )
    return transformers.RoFormerForMaskedLM(config).eval()


@pytest.mark.parametrize("name", PATCHES)
def test_a_subclass_of_another_library(name):
    model, plain = patched(name), logits(strong("llama"))
    wanted = logits(model)
    module = model.model.rotary_emb
    module.__class__ = type("Wrapped", (type(module),), {"extra": 1})
    assert torch.equal(logits(model), wanted)
    rope_scaling.unpatch(model)
    assert torch.equal(logits(model), plain)
    assert type(module).__name__ == "Wrapped" and module.extra == 1 and "_Pinned" not in str(type(module).__mro__)


def test_s2_attention_around_a_patch():
    model = rope_scaling.use_s2_attention(strong("llama"), 8)
    with pytest.raises(RopeScalingError, match="S2 attention, which cannot be combined"):
        patched("rerope", model)
    patched("yarn", model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RopeScalingError, match="disables S2 attention"):
        model.train()(token_ids(32))
    logits(model.eval())
    rope_scaling.remove_s2_attention(model)
    assert model.config._attn_implementation == "sdpa" and model.train()(token_ids(32)).logits is not None
    spans = patched("rerope")
    with pytest.raises(RopeScalingError, match="cannot be combined"):
        rope_scaling.use_s2_attention(spans, 8)
    with pytest.raises(RopeScalingError, match="no S2 attention"):
        rope_scaling.remove_s2_attention(spans)


@pytest.mark.parametrize("name", PATCHES)
def test_two_models_of_one_config(name):
    config = make_model("llama", initializer_range=0.15).config
    torch.manual_seed(0)
    one = LlamaForCausalLM(config).eval()
    other = LlamaForCausalLM(config).eval()
    before, written = logits(other), config.to_json_string()
    patched(name, one)
    assert torch.equal(logits(other), before) and config.to_json_string() == written
    assert other.config is config and one.config is one.model.config is not config
    third = patched(name, LlamaForCausalLM(config).eval())
    logits(one), logits(third)
    rope_scaling.unpatch(one)
    logits(third)
    assert diagnose(other).healthy and diagnose(third).healthy


@pytest.mark.parametrize("name", PATCHES)
def test_an_inner_model_is_saved_by_the_outer_one(name, tmp_path):
    model = strong("llama")
    patched(name, model.model)
    wanted = logits(model)
    assert model.config is model.model.config
    model.save_pretrained(tmp_path)
    assert close(logits(rope_scaling.from_pretrained(tmp_path)), wanted)


def test_models_can_be_built_from_a_patched_config():
    for name in ("yarn", "rerope"):
        model = patched(name)
        again = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
        again.load_state_dict(model.state_dict())
        if name == "rerope":
            with pytest.raises(RopeScalingError, match=r"built from a patched model's config. Patch it"):
                logits(again)
        assert torch.equal(logits(rope_scaling.patch(again)), logits(model))


ODD_LAYOUTS = {
    "neighbours": lambda: other_family("CohereConfig"),
    "neighbours, part of the head": lambda: other_family("GlmConfig", head_dim=16, partial_rotary_factor=0.5),
    "some layers do not rotate": lambda: other_family("SmolLM3Config"),
    "experts": lambda: other_family("GptOssConfig", head_dim=16, num_local_experts=4, sliding_window=32),
}


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
def test_the_layout_of_a_model_without_weights_is_seen(layout):
    """Patched on the meta device, then given weights: as when it is patched after loading."""
    model = ODD_LAYOUTS[layout]()
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config)).eval()
    rope_scaling.patch(empty, "rerope", window=20)
    empty = empty.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            assert torch.equal(empty.get_buffer(name), buffer)
    empty.load_state_dict(model.state_dict())
    rope_scaling.patch(model, "rerope", window=20)
    ids = token_ids(100)
    assert close(logits(empty, ids), logits(model, ids))


@pytest.mark.parametrize("family", ["CohereConfig", "SmolLM3Config"])
def test_offloaded_models_are_looked_at(family, tmp_path):
    from accelerate import dispatch_model

    wanted = logits(rope_scaling.patch(other_family(family, tie_word_embeddings=False), "rerope", window=20))
    model = other_family(family, tie_word_embeddings=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    devices = {"model": "disk", "lm_head": "cpu"}
    model = dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert next(model.parameters()).is_meta
    assert close(logits(rope_scaling.patch(model, "rerope", window=20)), wanted)


def fill(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True)[CACHE_NAME]


def go_on(model, cache):
    with torch.no_grad():
        return model(token_ids(1), **{CACHE_NAME: cache}).logits


def test_a_cache_belongs_to_the_frequencies_that_filled_it():
    model, ids = strong("llama"), token_ids(40)
    unpatched = fill(model, ids)
    rope_scaling.patch(model, "yarn", factor=2)
    with pytest.raises(RopeScalingError, match="rotated with other frequencies than those of yarn"):
        go_on(model, unpatched)
    by_two = fill(model, ids)
    copied = copy.deepcopy(by_two)
    wanted = go_on(model, copy.deepcopy(by_two))
    rope_scaling.patch(model, "yarn", factor=4)
    with pytest.raises(RopeScalingError, match=r"other frequencies than those of yarn:factor=4"):
        go_on(model, by_two)
    rope_scaling.unpatch(model)
    with pytest.raises(RopeScalingError, match=r"filled under yarn:factor=2, which is no longer in effect"):
        go_on(model, by_two)
    rope_scaling.patch(model, "yarn", factor=2)
    assert torch.equal(go_on(model, by_two), wanted) and torch.equal(go_on(model, copied), wanted)


def test_span_methods_may_change_while_a_cache_is_alive():
    """Keys are cached as the model rotates them, which no span method changes."""
    model, ids = strong("llama"), token_ids(40)
    cache = fill(model, ids)
    rope_scaling.patch(model, "rerope", window=20)
    whole = logits(model, torch.cat([ids, token_ids(1)], 1))[:, -1:]
    assert not close(logits(strong("llama"), torch.cat([ids, token_ids(1)], 1))[:, -1:], whole)
    assert go_on(model, cache).isfinite().all()


def remove_middle(layer):
    layer.keys, layer.values = (torch.cat([x[:, :, :10], x[:, :, 20:]], 2) for x in (layer.keys, layer.values))


def remove_first(layer):
    layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]


def remove_scattered(layer):
    layer.keys, layer.values = layer.keys[:, :, ::2].contiguous(), layer.values[:, :, ::2].contiguous()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("remove", [remove_middle, remove_first, remove_scattered])
def test_keys_taken_out_of_a_cache_are_refused(remove, given):
    model = patched("rerope")
    cache = DynamicCache(config=model.config)
    cache = model(token_ids(60, 2), **({CACHE_NAME: cache} if given else {"use_cache": True}))[CACHE_NAME]
    for layer in cache.layers:
        remove(layer)
    with pytest.raises(RopeScalingError, match="Keys were removed from the middle of this cache"):
        model(token_ids(1, 2), position_ids=torch.tensor([[60]]), **{CACHE_NAME: cache})


def test_keys_taken_out_of_a_windowed_cache_are_refused():
    model = patched("sliding_window")
    cache = fill(model, token_ids(60))
    for layer in cache.layers:
        remove_middle(layer)
    with pytest.raises(RopeScalingError, match="removed keys from this cache"):
        go_on(model, cache)


def test_caches_may_be_cropped_selected_and_reordered():
    model, ids = patched("rerope"), token_ids(60, 3)
    wanted = logits(model, torch.cat([ids[:, :50], token_ids(1, 3)], 1))[:, -1:]
    cache = fill(model, ids)
    cache.crop(-10)
    with torch.no_grad():
        found = model(token_ids(1, 3), **{CACHE_NAME: cache}).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    cache = fill(model, ids)
    for layer in cache.layers:
        layer.keys, layer.values = (x[[2, 0]][:, :, :50].clone() for x in (layer.keys, layer.values))
    with torch.no_grad():
        found = model(token_ids(1, 3)[[2, 0]], **{CACHE_NAME: cache}).logits
    assert torch.allclose(found, wanted[[2, 0]], atol=1e-5)


@pytest.mark.parametrize("name", PATCHES)
def test_traced_models_work_at_another_length_or_are_refused(name):
    model = patched(name)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    short, long = token_ids(12), token_ids(90)
    if name != "yarn":
        with pytest.raises(RopeScalingError, match=r"torch.jit.trace.* cannot follow"):
            torch.jit.trace(Logits(), (short, torch.ones_like(short)), check_trace=False)
        return
    traced = torch.jit.trace(Logits(), (short, torch.ones_like(short)), check_trace=False)
    assert torch.allclose(traced(long, torch.ones_like(long)), logits(model, long), atol=1e-5)
