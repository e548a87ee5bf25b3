"""`patch` takes effect, says so truthfully, and can be undone to the bit."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import FAMILIES, TRAINED_LENGTH, close, logits, make_model, rotary, same_state, state, token_ids

import rope_scaling
from cases import METHOD_CASES, arguments_of
from rope_scaling import Linear, Ntk, RopeScalingError, Yarn, make_method
from rope_scaling.frequencies import METHODS
from rope_scaling.hf import model_patch
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.pretrained_rope import pretrained_settings, read_pretrained
from rope_scaling.hf.rotary import rotary_slots


FULL_FAMILIES = [family for family in FAMILIES if family not in ("llama3.1", "qwen2-yarn")]


def frequencies(model, layer_type=None):
    return getattr(rotary(model), f"{layer_type}_inv_freq" if layer_type else "inv_freq")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FULL_FAMILIES)
def test_takes_effect_and_goes_back(family, name):
    model = make_model(family)
    before, original = state(model), logits(model)
    slot = next(slot for slot in rotary_slots(model) if slot.layer_type in (None, "full_attention"))
    pretrained = read_pretrained(slot, pretrained_settings(slot.module.config))
    arguments = arguments_of(name, pretrained.geometry.num_pairs)

    assert rope_scaling.patch(model, name, **arguments) is model
    wanted, attention_factor = make_method(name, **arguments).inv_freq(pretrained.geometry)
    assert torch.allclose(slot.inv_freq, wanted, rtol=2e-6, atol=1e-30)
    assert slot.attention_factor == pytest.approx(attention_factor, rel=1e-6)
    assert not torch.equal(logits(model), original)
    assert torch.isfinite(logits(model)).all()
    assert type(model.config.max_position_embeddings) is int
    assert model.config.max_position_embeddings == (4 if METHOD_CASES[name][1] else 1) * TRAINED_LENGTH

    assert rope_scaling.unpatch(model) is model
    assert torch.equal(logits(model), original)
    assert same_state(state(model), before)


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_partial_rotary_models_have_the_width_of_their_rotary_part(family):
    (slot,) = rotary_slots(make_model(family))
    geometry = read_pretrained(slot, pretrained_settings(slot.module.config)).geometry
    assert (geometry.rotary_dim, geometry.head_dim) == (8, 16)


def test_gemma3_leaves_sliding_layers_alone_by_default():
    model = make_model("gemma3")
    sliding, full = frequencies(model, "sliding_attention").clone(), frequencies(model, "full_attention").clone()
    rope_scaling.patch(model, "linear", factor=4)
    assert torch.equal(frequencies(model, "sliding_attention"), sliding)
    assert torch.allclose(frequencies(model, "full_attention"), full / 4)
    rope_scaling.patch(model, "linear", factor=4, layer_types="all")
    assert torch.allclose(frequencies(model, "sliding_attention"), sliding / 4)
    rope_scaling.patch(model, "linear", factor=4, layer_types=["sliding_attention"])
    assert torch.equal(frequencies(model, "full_attention"), full)


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_frequencies_stay_float32_through_a_change_of_dtype(family, convert):
    layer_type = "full_attention" if family == "gemma3" else None
    wanted = frequencies(rope_scaling.patch(make_model(family), "yarn", factor=4), layer_type)
    after = convert(rope_scaling.patch(make_model(family), "yarn", factor=4))
    before = rope_scaling.patch(convert(make_model(family)), "yarn", factor=4)
    for model in (after, before):
        assert model.dtype != torch.float32
        assert frequencies(model, layer_type).dtype == torch.float32
        assert torch.equal(frequencies(model, layer_type), wanted)


def test_unpatch_after_a_change_of_dtype_gives_back_the_pretrained_frequencies(llama):
    pretrained = frequencies(llama).clone()
    rope_scaling.patch(llama, "yarn", factor=4)
    rope_scaling.unpatch(llama.to(torch.bfloat16))
    assert torch.equal(frequencies(llama), pretrained)


def test_survives_an_empty_device_and_a_fresh_initialisation(llama):
    rope_scaling.patch(llama, "yarn", factor=4)
    wanted = frequencies(llama).clone()
    llama.to("meta").to_empty(device="cpu")
    assert torch.equal(frequencies(llama), wanted)
    frequencies(llama).zero_()
    llama._init_weights(rotary(llama))
    assert torch.equal(frequencies(llama), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_patch_and_are_independent(family, duplicate):
    model = make_model(family)
    original = logits(model)
    rope_scaling.patch(model, "mrrope_pro", factor=4)
    patched = logits(model)
    twin = duplicate(model)
    assert close(logits(twin), patched)
    rope_scaling.unpatch(twin)
    assert close(logits(twin), original)
    assert torch.equal(logits(model), patched)


def test_two_models_two_patches_in_two_threads():
    models = [make_model("llama") for _ in range(2)]
    wanted = []
    for model, name in zip(models, ("linear", "yarn"), strict=True):
        wanted.append(logits(rope_scaling.patch(copy.deepcopy(model), name, factor=4)))

    def work(model, name):
        for _ in range(20):
            rope_scaling.patch(model, name, factor=4)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, ("linear", "yarn"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(logits(model), logit) for model, logit in zip(models, wanted, strict=True))


def test_patching_again_starts_from_the_pretrained_frequencies(llama):
    fresh = logits(rope_scaling.patch(make_model("llama"), "yarn", factor=4))
    original = logits(llama)
    for name in ("linear", "ntk", "yarn"):
        rope_scaling.patch(llama, name, factor=4)
    assert torch.equal(logits(llama), fresh)
    rope_scaling.unpatch(llama)
    assert torch.equal(logits(llama), original)


def test_factor_and_target_length_and_objects_say_the_same():
    by_factor = logits(rope_scaling.patch(make_model("llama"), "yarn", factor=4))
    by_length = logits(rope_scaling.patch(make_model("llama"), "yarn", target_length=4 * TRAINED_LENGTH))
    by_object = logits(rope_scaling.patch(make_model("llama"), Yarn(factor=4)))
    by_list = logits(rope_scaling.patch(make_model("llama"), [Yarn(factor=4.0)], factor=4))
    assert all(torch.equal(by_factor, other) for other in (by_length, by_object, by_list))


def test_methods_without_a_factor_take_a_target_length(llama):
    rope_scaling.patch(llama, "abf", rope_theta=1e6, target_length=200)
    assert llama.config.max_position_embeddings == 200
    assert llama.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_context_manager_puts_back_what_was_there(llama):
    before = state(llama)
    with rope_scaling.patched(llama, "yarn", factor=4) as same:
        assert same is llama and llama.config.max_position_embeddings == 4 * TRAINED_LENGTH
        inner = state(llama)
        with rope_scaling.patched(llama, Ntk(factor=2)):
            assert llama.config.rope_parameters["rope_type"] == "default"
        assert same_state(state(llama), inner)
    assert same_state(state(llama), before)
    with pytest.raises(ZeroDivisionError), rope_scaling.patched(llama, "yarn", factor=4):
        _ = 1 / 0
    assert same_state(state(llama), before)


def test_original_length_may_be_given():
    model = make_model("llama")
    vars(model.config)["max_position_embeddings"] = None
    with pytest.raises(
        RopeScalingError, match=r"no trained length.*Pass it: `patch\(..., original_max_position_embeddings=4096\)`"
    ):
        rope_scaling.patch(model, "yarn", factor=4)
    rope_scaling.patch(model, "yarn", factor=4, original_max_position_embeddings=32)
    assert model.config.max_position_embeddings == 128


# Models that arrive scaled.


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3"])
def test_the_same_method_multiplies_factors_and_keeps_the_first_trained_length(name):
    once = rope_scaling.patch(make_model("llama"), name, factor=8)
    arrived = make_model("llama", **_arrived(name, 4))
    rope_scaling.patch(arrived, name, factor=2)
    assert torch.equal(frequencies(arrived), frequencies(once))
    assert rotary(arrived).attention_scaling == rotary(once).attention_scaling
    assert arrived.config.max_position_embeddings == 8 * TRAINED_LENGTH


def _arrived(name, factor):
    model = rope_scaling.patch(make_model("llama"), name, factor=factor)
    parameters = dict(model.config.rope_parameters)
    return {"rope_parameters": parameters, "max_position_embeddings": factor * TRAINED_LENGTH}


def test_another_method_keeps_what_was_there_and_multiplies():
    model = make_model("llama3.1")
    arrived, reach = frequencies(model).clone(), model.config.max_position_embeddings
    rope_scaling.patch(model, "linear", factor=2)
    assert torch.allclose(frequencies(model), arrived / 2, rtol=1e-6)
    assert model.config.max_position_embeddings == 2 * reach

    rope_scaling.patch(model, "yarn", factor=2)
    geometry = rope_scaling.RopeGeometry(rotary_dim=16, rope_theta=5e5, original_max_position_embeddings=reach)
    ratio = Yarn(factor=2).inv_freq(geometry)[0] / rope_scaling.default_inv_freq(geometry)
    assert torch.allclose(frequencies(model).double(), arrived * ratio, rtol=1e-6)
    rope_scaling.unpatch(model)
    assert torch.equal(frequencies(model), arrived)


@pytest.mark.parametrize("wrapped", [{}, {"wrapped": "llama3", "factor": 2}, {"wrapped": "ntk", "factor": 2}])
def test_resonance_rounds_last_on_a_model_that_arrives_scaled(wrapped):
    model = rope_scaling.patch(make_model("llama3.1"), "resonance", **wrapped)
    wavelengths = 2 * torch.pi / frequencies(model).double()
    assert torch.allclose(wavelengths, wavelengths.round(), rtol=1e-6)


def test_arrived_fields_are_kept_unless_given():
    parameters = {**FAMILIES["qwen2-yarn"][1]["rope_parameters"], "beta_fast": 16.0}
    model = rope_scaling.patch(make_model("qwen2-yarn", rope_parameters=parameters), "yarn", factor=2)
    assert model.config.rope_parameters["beta_fast"] == 16.0
    rope_scaling.patch(model, "yarn", factor=2, beta_fast=24.0)
    assert model.config.rope_parameters["beta_fast"] == 24.0
    assert model.config.rope_parameters["factor"] == 8.0


def test_longrope_with_two_lists_is_extended_from_its_long_one():
    lists = {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    }
    model = make_model("llama", rope_parameters={"rope_type": "longrope", **lists}, max_position_embeddings=256)
    short = frequencies(model).clone()
    rope_scaling.patch(model, "linear", factor=2)
    assert torch.allclose(frequencies(model), short / 4, rtol=1e-6)
    rope_scaling.unpatch(model)
    assert torch.equal(frequencies(model), short)


def test_other_rope_parameters_stay():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    model = rope_scaling.patch(make_model("llama", rope_parameters=rope), "yarn", factor=4)
    assert model.config.rope_parameters["mrope_section"] == [2, 3, 3]


# Refusals.


def test_a_module_that_does_not_take_the_change_is_reported_and_left(llama):
    """Code of one's own may hand out frequencies from elsewhere."""
    module = llama.model.rotary_emb

    class StubbornRotaryEmbedding(type(module)):
        inv_freq = property(lambda self: self.fixed)

    module.fixed = module.inv_freq.clone()
    module.__class__ = StubbornRotaryEmbedding
    before = state(llama)
    with pytest.raises(RopeScalingError, match="did not take effect on `model.rotary_emb`"):
        rope_scaling.patch(llama, "yarn", factor=4)
    assert same_state(state(llama), before) and type(module) is StubbornRotaryEmbedding


def test_a_failure_halfway_leaves_the_earlier_patch(llama, monkeypatch):
    rope_scaling.patch(llama, "yarn", factor=4)
    before = state(llama)
    verify = model_patch._verify
    monkeypatch.setattr(
        model_patch,
        "_verify",
        lambda slot, change: verify(slot, change) if change.rope_parameters["rope_type"] == "yarn" else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        rope_scaling.patch(llama, "linear", factor=4)
    assert same_state(state(llama), before)


def test_a_patch_that_changes_nothing_raises(llama):
    before = state(llama)
    for method in (Linear(factor=1), Yarn(factor=1), "p_rope"):
        arguments = {"partial_rotary_factor": 1.0} if method == "p_rope" else {}
        with pytest.raises(RopeScalingError, match="changes nothing on this model"):
            rope_scaling.patch(llama, method, **arguments)
    assert same_state(state(llama), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yran",), r"Unknown method 'yran'\. Did you mean 'yarn'"),
        (("yarn", {}), "'yarn' requires a length: give `factor` or `target_length`"),
        (
            ("yarn", {"factor": 4, "target_length": 256}),
            "`factor` or `target_length`, not both; got factor=4 and target_length=256",
        ),
        (("yarn", {"factor": 0.5}), "`factor` must be a finite number, at least 1; got 0.5"),
        (("yarn", {"factor": float("nan")}), "got nan"),
        (("yarn", {"factor": "4"}), "got '4'"),
        (
            ("yarn", {"target_length": 32}),
            "`target_length` is 32, but the context length as loaded is 64; give at least 64",
        ),
        (("yarn", {"target_length": 100.5}), "`target_length` must be a whole number of tokens.*got 100.5"),
        (("yarn", {"factor": 4, "bta_fast": 3}), "Unknown argument of 'yarn': 'bta_fast'. Did you mean 'beta_fast'"),
        (
            ("longrope", {"factor": 4, "long_factor": [1.0, 2.0]}),
            "`long_factor` has 2 numbers; this model rotates 8 pairs",
        ),
        (("yarn", {"factor": 4, "layer_types": "full_attention"}), "all layers of this model rotate alike"),
        ((Yarn(factor=4), {"factor": 2}), "`factor` is 2, but the method has 4"),
        (
            (Yarn(factor=4), {"target_length": 128}),
            "`target_length` is 128, but the method's factor 4 times 64 tokens is 256",
        ),
        ((Yarn(factor=4), {"beta_fast": 2}), r"a method object carries its own fields.*`Yarn\(...\)`"),
        (([Yarn(factor=4), Ntk(factor=4)],), "yarn and ntk both decide the frequencies, so they cannot be combined"),
        (([],), "No method given. Name one"),
        ((3,), "must be a name such as 'yarn' or a method object"),
        ((None,), "no record of a patch. Name a method"),
        ((None, {"factor": 4}), "factor given without a method"),
        ((None, {"original_max_position_embeddings": 9}), "original_max_position_embeddings given without a method"),
    ],
)
def test_bad_arguments(llama, arguments, message):
    before = state(llama)
    method, keywords = arguments if len(arguments) == 2 else (arguments[0], {})
    with pytest.raises(RopeScalingError, match=message):
        rope_scaling.patch(llama, method, **keywords)
    assert same_state(state(llama), before)


def test_unknown_layer_type():
    with pytest.raises(RopeScalingError, match="Unknown layer type 'full_atention'. Did you mean 'full_attention'"):
        rope_scaling.patch(make_model("gemma3"), "yarn", factor=4, layer_types="full_atention")


@pytest.mark.parametrize("name", ["GPT2", "Bert"])
def test_a_model_without_rope(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    model = getattr(transformers, f"{name}LMHeadModel")(config)
    with pytest.raises(
        RopeScalingError, match=f"{name}LMHeadModel has no rotary position embedding.*no module was touched"
    ):
        rope_scaling.patch(model, "yarn", factor=4)


@pytest.mark.parametrize("thing", ["HuggingFaceTB/SmolLM2-135M", None, {}])
def test_something_that_is_no_model(thing):
    with pytest.raises(RopeScalingError, match="`model` must be a loaded model"):
        rope_scaling.patch(thing, "yarn", factor=4)


def test_unpatch_without_a_patch(llama):
    with pytest.raises(RopeScalingError, match="not patched"):
        rope_scaling.unpatch(llama)


def test_a_config_edited_after_loading_is_noticed(llama):
    llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(RopeScalingError, match="are not those of the model's config.*load the model again"):
        rope_scaling.patch(llama, "yarn", factor=4)


def test_length_dependent_frequencies_are_refused():
    model = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(RopeScalingError, match="is loaded with `rope_type` 'dynamic'.*Load it with plain frequencies"):
        rope_scaling.patch(model, "yarn", factor=4)


def test_an_odd_rotary_width_is_refused():
    model = make_model("phi", partial_rotary_factor=1.0, hidden_size=12)  # heads 3 wide
    with pytest.raises(
        RopeScalingError, match="must be even, because dimensions rotate in pairs; the heads of this model are 3 wide"
    ):
        rope_scaling.patch(model, "yarn", factor=4)


def test_a_sliding_window_on_every_layer_is_warned_of():
    with pytest.warns(UserWarning, match=r"attends to the last 16 tokens only.*no layer sees 256 tokens"):
        rope_scaling.patch(make_model("mistral", sliding_window=16), "yarn", factor=4)


# Static methods in every way of running.


@pytest.mark.parametrize("name", METHODS)
def test_one_answer_whole_in_chunks_token_by_token_and_left_padded(name):
    model = make_model("llama")
    rope_scaling.patch(model, name, **arguments_of(name, 8))
    ids = token_ids(100)
    whole = logits(model, ids)
    with torch.no_grad():
        for sizes in ([37, 50, 13], [99, 1], [1] * 100):
            cache, parts = None, []
            for piece in ids.split(sizes, dim=1):
                output = model(piece, **{CACHE_NAME: cache}, use_cache=True)
                cache = output[CACHE_NAME]
                parts.append(output.logits)
            assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(130) >= 30).long()[None]
    assert torch.allclose(logits(model, padded, attention_mask=mask)[:, 30:], whole, atol=1e-4)


def test_generation_past_the_trained_length_is_the_uncached_argmax(llama):
    rope_scaling.patch(llama, "yarn", factor=4)
    prompt = token_ids(60)
    generated = llama.generate(prompt, max_new_tokens=20, do_sample=False)
    expected = prompt
    for _ in range(20):
        expected = torch.cat([expected, logits(llama, expected, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)
