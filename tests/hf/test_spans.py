"""Patched attention in training, in other families, beside the host's own features; and what it refuses."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import OTHER_FAMILIES, TRAINED_LENGTH, apply, logits, make_model, other_family, strong, token_ids
from transformers import DynamicCache

import rope_scaling
from rope_scaling import (
    Alternating,
    AngleClip,
    DualChunk,
    DynamicNtk,
    LogN,
    ReRope,
    RopeScalingError,
    SelfExtend,
    SlidingWindow,
    Span,
    SpanMethod,
    Streaming,
    Yarn,
)
from rope_scaling.attention.reference import reference_attention
from rope_scaling.attention.sequences import read_documents
from rope_scaling.hf.attention import CALL, NAME, Call, installed
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.save_guard import MESSAGE
from span_cases import SPAN_CASES


def close(one, other, tolerance=1e-4):
    return torch.allclose(one, other, atol=tolerance, rtol=0)


def eager(model, ids):
    model.set_attn_implementation("eager")
    return logits(model, ids)


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families_read_as_they_would_where_nothing_changes(name):
    """A window as long as the text goes through the engine and must give the stock logits: layouts, partial heads,
    layers of another kind, sinks and soft-capping included."""
    model, ids = OTHER_FAMILIES[name](), token_ids(100, rows=2)
    wanted = eager(model, ids)
    rope_scaling.patch(model, SlidingWindow(window=100))
    assert close(logits(model, ids), wanted)
    rope_scaling.patch(model, DynamicNtk())  # inside the trained length nothing changes
    assert close(logits(model, ids)[:, :TRAINED_LENGTH], wanted[:, :TRAINED_LENGTH])
    rope_scaling.patch(model, ReRope(window=20))
    assert not close(logits(model, ids), wanted, 1e-3)
    rope_scaling.unpatch(model)
    assert close(logits(model, ids), wanted)


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families_in_steps(name):
    model, ids = OTHER_FAMILIES[name](), token_ids(100)
    rope_scaling.patch(model, SelfExtend(window=30, group_size=7))
    wanted = logits(model, ids, use_cache=False)
    cache, outs = None, []
    for part in ids.split([40, 1, 1, 27, *[1] * 5, 26], dim=1):
        with torch.no_grad():
            out = model(part, **{CACHE_NAME: cache}, use_cache=True)
        cache = out[CACHE_NAME]
        outs.append(out.logits)
    assert close(torch.cat(outs, dim=1), wanted)


def test_a_frozen_dynamic_method_is_the_static_one():
    """Of the same arithmetic, through attention in place of the table."""
    model, ids = strong("llama"), token_ids(200)
    rope_scaling.patch(model, Yarn(factor=200 / TRAINED_LENGTH))
    wanted = logits(model, ids)
    rope_scaling.patch(model, rope_scaling.DynamicYarn().freeze(200))
    assert close(logits(model, ids), wanted)


@pytest.mark.parametrize("family", ["llama3.1", "qwen2-yarn"])
def test_models_that_arrive_scaled_are_extended_from_what_they_read(family):
    model = make_model(family, initializer_range=0.15)
    reach = TRAINED_LENGTH * {"llama3.1": 8, "qwen2-yarn": 4}[family]
    ids = token_ids(reach + 60)
    plain = logits(model, ids)
    rope_scaling.patch(model, DynamicNtk(steps=(1.0, 2.0)))
    found = logits(model, ids)
    assert close(found[:, :reach], plain[:, :reach]) and not close(found[:, reach:], plain[:, reach:], 1e-3)
    rope_scaling.patch(model, DynamicNtk().freeze(2 * reach))
    frozen = logits(model, ids)
    rope_scaling.patch(model, "ntk", factor=2)
    assert close(logits(model, ids), frozen)
    rope_scaling.patch(model, AngleClip(saturation_length=reach))
    assert close(logits(model, ids)[:, :reach], plain[:, :reach])


def test_a_model_that_arrives_with_two_lists_switches_by_position():
    """Phi-3's way: Transformers switches all of a call, and leaves what lies in a cache behind."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.6 * i for i in range(8)]}
    arrived = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    arrived["original_max_position_embeddings"] = TRAINED_LENGTH
    model = make_model(
        "phi3", initializer_range=0.15, max_position_embeddings=4 * TRAINED_LENGTH, rope_parameters=arrived
    )
    ids = token_ids(150)
    short = logits(model, ids[:, :TRAINED_LENGTH])
    rope_scaling.patch(model, rope_scaling.DynamicLongRope(factor=4.0, **factors))
    whole = logits(model, ids)
    assert close(whole[:, :TRAINED_LENGTH], short)
    with torch.no_grad():
        cache = model(ids[:, :50], use_cache=True)[CACHE_NAME]
        assert close(model(ids[:, 50:], **{CACHE_NAME: cache}).logits, whole[:, 50:])
    assert model.config.max_position_embeddings == 4 * TRAINED_LENGTH


@pytest.mark.parametrize("method", [AngleClip(saturation_length=4096), DynamicNtk(), ReRope(window=4096)])
def test_inside_the_trained_length_logits_are_the_pretrained_ones_to_the_bit(method):
    """Also where that is longer than a tile; beyond it, they are others."""
    model = make_model("llama", initializer_range=0.15, max_position_embeddings=4096)
    ids = token_ids(4296)
    plain = logits(model, ids[:, :4096])
    rope_scaling.patch(model, method)
    assert torch.equal(logits(model, ids[:, :4096]), plain)
    assert close(logits(model, ids)[:, :4096], plain)


def grads(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("case", ["rerope+log_n", "angle_clip-uniform", "dual_chunk+window", "dynamic_yarn"])
def test_gradients_through_checkpointing_autocast_and_packing(case, monkeypatch):
    model, ids = apply(strong("llama"), case).train(), token_ids(150, rows=2)
    ours = grads(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr("rope_scaling.hf.attention.tiled_attention", reference_attention)
        wanted = grads(model, ids)
    assert all(close(ours[name], wanted[name]) for name in wanted) and len(ours) == len(wanted)
    model.gradient_checkpointing_enable()
    assert all(close(found, ours[name], 1e-6) for name, found in grads(model, ids).items())
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        rough = grads(model, ids)
    scale = max(value.abs().max() for value in ours.values())
    assert all(close(rough[name], ours[name], 0.15 * float(scale)) for name in ours)


def test_attention_dropout_in_training():
    model = apply(make_model("llama", attention_dropout=0.5, initializer_range=0.15), "rerope")
    ids = token_ids(100)
    still = logits(model, ids)
    assert torch.equal(logits(model, ids), still)
    model.train()
    with pytest.warns(UserWarning, match=r"Attention dropout \(0.5\) does not go through a fused kernel") as told:
        assert not close(logits(model, ids), logits(model, ids), 1e-2)
    assert len([one for one in told if "dropout" in str(one.message)]) == 1
    grads(model, ids)
    model.gradient_checkpointing_enable()
    grads(model, ids)


def test_positions_that_skip_ahead_stay_in_their_document():
    """As in PoSE, with or without a mask, with or without a cache to fill: always the same."""
    model = apply(strong("llama"), "dynamic_ntk")
    ids = token_ids(60)
    positions = torch.cat([torch.arange(30), torch.arange(90, 120)])[None]
    wanted = logits(model, ids, position_ids=positions)
    assert torch.equal(logits(model, ids, position_ids=positions, use_cache=False), wanted)
    assert torch.equal(logits(model, ids, position_ids=positions, attention_mask=torch.ones_like(ids)), wanted)
    assert not close(wanted[:, 30:], logits(model, ids[:, 30:], position_ids=positions[:, 30:]), 1e-2)
    assert close(wanted[:, :30], logits(model, ids[:, :30]))


def test_padding_on_the_right():
    model = apply(strong("llama"), "self_extend")
    ids, mask = token_ids(100, rows=2), torch.ones(2, 100, dtype=torch.long)
    alone = logits(model, ids[1:, :70])
    mask[1, 70:] = 0
    assert close(logits(model, ids, attention_mask=mask)[1:, :70], alone)


def test_inputs_embeds_and_bare_decoders():
    model = apply(strong("llama"), "rerope")
    ids = token_ids(100)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, logits(model, ids))
        hidden = model.model(ids).last_hidden_state
    bare = strong("llama").model
    with torch.no_grad():
        assert close(rope_scaling.patch(bare, "rerope")(ids).last_hidden_state, hidden)
        mask = torch.ones_like(ids)
        mask[:, :30] = 0
        by_name = bare(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(bare(ids, mask).last_hidden_state, by_name) and not close(by_name, hidden)


@pytest.mark.parametrize("case", ["dual_chunk", "yarn+window+llama4"])
def test_copies_and_pickles_carry_the_patch(case):
    model = apply(strong("llama"), case)
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(logits(other), wanted)
        assert close(logits(rope_scaling.unpatch(other)), logits(strong("llama")))
    assert close(logits(model), wanted)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_goes_back_and_leaves_nothing(case):
    model = strong("llama")
    before, config = logits(model), model.config.to_json_string(use_diff=False)
    with rope_scaling.patched(model, "yarn", factor=4):
        outer = logits(model)
        apply(model, case)
        assert model.config._attn_implementation == NAME and MESSAGE in model.config.to_json_string()
        assert not torch.equal(logits(model), before)
        rope_scaling.patch(model, "yarn", factor=4)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), before)
    assert model.config.to_json_string(use_diff=False) == config
    assert model.config._attn_implementation == "sdpa" and not model.model._forward_pre_hooks


def test_patched_nests():
    model = strong("llama")
    with rope_scaling.patched(model, ReRope()):
        first = logits(model)
        with rope_scaling.patched(model, DualChunk()):
            assert not close(logits(model), first, 1e-3)
        assert torch.equal(logits(model), first)


def test_other_dtypes_and_peft():
    from peft import LoraConfig, get_peft_model

    model = apply(strong("llama"), "rerope")
    wanted = logits(model)
    assert close(logits(copy.deepcopy(model).to(torch.bfloat16)).float(), wanted, 0.2)
    wrapped = get_peft_model(strong("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    rope_scaling.patch(wrapped, "rerope")
    assert close(logits(wrapped), wanted)
    wrapped.train()
    wrapped(token_ids(100), labels=token_ids(100)).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in wrapped.named_parameters() if "lora_B" in n)


def test_a_cache_under_any_name_is_seen_and_one_that_is_not_is_told():
    model, ids = apply(strong("llama"), "rerope"), token_ids(120)
    wanted = logits(model, ids)
    for name in ("past_key_values", CACHE_NAME):
        for whose in (model, model.model):  # the head renames it, the decoder's hook comes before it could
            cache = DynamicCache(config=model.config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                whose(ids[:, :70], **{name: cache})
                out = whose(ids[:, 70:], **{name: cache})
            found = out.logits if whose is model else model.lm_head(out.last_hidden_state)
            assert close(found, wanted[:, 70:])
    cache = DynamicCache(config=model.config)
    model(ids[:, :70], **{CACHE_NAME: cache})
    inner = model.model.layers[0].self_attn
    hidden = {"hidden_states": torch.zeros(1, 50, 64), "attention_mask": None, CACHE_NAME: cache}
    turns = model.model.rotary_emb(hidden["hidden_states"], torch.arange(70, 120)[None])
    call = Call(installed(model.model), read_documents(1, 50, 0, None, None), [], 50)
    with pytest.raises(
        RopeScalingError, match=r"got 120 keys in a call of 50 tokens, but the decoder hook found no cache"
    ):
        inner(**hidden, position_embeddings=turns, **{CALL: call})


def test_a_patch_of_another_model_is_not_seen():
    one, other = apply(strong("llama"), "rerope"), apply(strong("qwen3"), "streaming")
    first, second = logits(one), logits(other)
    assert torch.equal(logits(one), first) and torch.equal(logits(other), second)


class EveryOther(SpanMethod):
    """Far keys at half their distance: a method of a user's own."""

    def spans(self, rope):
        near = Span(first=lambda m: (m - 31).clamp(min=0), last=lambda m: m)
        far = Span(
            first=lambda m: m * 0,
            last=lambda m: m - 32,
            query=rope.positions(lambda m: (m + 32) / 2),
            key=rope.positions(lambda n: n / 2),
        )
        return [near, far]


def test_a_method_of_ones_own():
    model, ids = strong("llama"), token_ids(150)
    rope_scaling.patch(model, rope_scaling.LeakyReRope(window=32, slope=2.0))
    wanted = logits(model, ids)
    rope_scaling.patch(model, EveryOther())
    assert close(logits(model, ids), wanted)
    assert "EveryOther" in rope_scaling.describe(model).slots[0].method


def own(*spans):
    class Own(SpanMethod):
        def spans(self, rope):
            return list(spans)

    return Own()


def clip(low, high):
    return Span(first=low, last=high)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (own(), "must be a list of one or more `Span`"),
        (own(clip(lambda m: m * 0, lambda m: m), clip(lambda m: m - 5, lambda m: m - 3)), "spans 0 and 1 overlap at"),
        (own(clip(lambda m: m * 0, lambda m: m + 1)), "span 0 looks ahead of the query"),
        (
            own(clip(lambda m: m - m % 7, lambda m: m), clip(lambda m: m * 0, lambda m: m - 2 * (m % 7) - 1)),
            "`last` of span 1 decrea",
        ),
        (own(clip(lambda m: m * 0, lambda m: m - 1)), "query 0 sees no key at all"),
        (own(clip(lambda m: m / 2, lambda m: m)), "must give one whole position"),
        (own(clip(lambda m: 0, lambda m: m)), "must give one whole position"),
        (
            own(Span(lambda m: m * 0, lambda m: m, query=lambda m: m[:, None] * 1.0)),
            "an angle for each of the 8 pairs",
        ),
        (own(Span(lambda m: m * 0, lambda m: m, amplitude=torch.ones(3))), "one number for each of the 8 pairs"),
    ],
)
def test_methods_of_ones_own_are_checked(method, message):
    model = strong("llama")
    before = logits(model)
    with pytest.raises(RopeScalingError, match=message):
        rope_scaling.patch(model, method)
    assert torch.equal(logits(model), before) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("methods", "arguments", "message"),
    [
        ([ReRope(), SelfExtend()], {}, "rerope and self_extend both decide the distances at which keys are seen"),
        ([SlidingWindow(), Streaming()], {}, "sliding_window and streaming both decide which keys are seen"),
        ([Yarn(factor=2), DynamicNtk()], {}, "yarn and dynamic_ntk both decide the frequencies"),
        ([LogN(), LogN(length=9)], {}, "log_n and log_n both decide the temperature"),
        (["yarn", ReRope()], {"factor": 2}, "A name stands for one method with its arguments"),
        ([ReRope], {}, "must be a name such as 'yarn' or a method object"),
        ([SelfExtend(group_size=2)], {"factor": 4}, "self_extend supports 96 tokens on this model .* 256 are wanted"),
        ([rope_scaling.String()], {"target_length": 100}, "string supports 80 tokens .* 100 are wanted"),
        ([Alternating(layer_kinds=("local",) * 3)], {}, "`layer_kinds` names 3 layers; this model has 2"),
        (["self_extend"], {"window": 64}, "no room is left"),
        (["rerop"], {}, "Unknown method 'rerop'. Did you mean 'rerope'"),
        (["rerope"], {"windw": 3}, "Unknown argument of 'rerope': 'windw'. Did you mean 'window'"),
    ],
)
def test_bad_patches(methods, arguments, message):
    model = strong("llama")
    before = logits(model)
    with pytest.raises(RopeScalingError, match=message):
        rope_scaling.patch(model, *methods, **arguments)
    assert torch.equal(logits(model), before) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "never stores its probabilities"),
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, r"1 for tokens and 0 for padding, with shape \(1, 20\); got"),
        ({"attention_mask": torch.full((1, 20), -100.0)}, "got shape .*torch.float32"),
        ({"attention_mask": torch.ones(1, 10, dtype=torch.long)}, r"with shape \(1, 20\); got shape \(1, 10\)"),
        ({"attention_mask": torch.tensor([[1, 0] * 10])}, "masks tokens in the middle of row 0"),
        ({"attention_mask": "causal"}, "must be a tensor of 1 for tokens and 0 for padding; got str"),
        ({"position_ids": torch.arange(19)[None]}, "must be one row of 20 positions"),
        ({"position_ids": torch.arange(20).repeat(3, 1, 1) + torch.arange(3)[:, None, None]}, "more than one axis"),
    ],
)
def test_bad_calls(arguments, message):
    model = apply(strong("llama"), "rerope")
    with pytest.raises(RopeScalingError, match=message):
        model(token_ids(20), **arguments)


def test_models_whose_attention_cannot_be_reached():
    model = other_family("StableLmConfig")
    with pytest.raises(RopeScalingError, match="does not hand its keyword arguments on to its attention"):
        rope_scaling.patch(model, "rerope")
    assert model.config._attn_implementation == "sdpa"
    rope_scaling.patch(model, "yarn", factor=2)  # frequencies do not need attention


def test_attention_that_is_bidirectional_is_refused_not_made_causal():
    model = make_model("llama", is_causal=False)
    changed = token_ids(150)
    changed[0, -1] += 1
    before = logits(model)
    assert not torch.equal(logits(model, changed)[:, 0], before[:, 0])
    for method in ("self_extend", "streaming", "log_n"):
        with pytest.raises(RopeScalingError, match="uses bidirectional attention"):
            rope_scaling.patch(model, method)
    assert torch.equal(logits(model), before)


def test_deepseeks_softmax_factor_follows_the_patch_and_goes_back(tmp_path):
    """It is computed when attention is built; a reloaded model has that of the patch, so the live one must too."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e4}
    values = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    values |= {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    yarn["original_max_position_embeddings"] = TRAINED_LENGTH // 2
    model = other_family("DeepseekV3Config", rope_parameters=yarn, moe_intermediate_size=32, **values)
    before, attention = logits(model), model.model.layers[0].self_attn
    scaling = attention.scaling
    rope_scaling.patch(model, "yarn", factor=4)
    assert attention.scaling > 1.1 * scaling
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path).eval()), logits(model), atol=1e-5)
    rope_scaling.unpatch(model)
    assert attention.scaling == scaling
    assert torch.equal(logits(model), before)


def test_layer_types_with_equal_frequencies_are_told_apart():
    """A layer is scaled for what it is, not for the first slot that holds its frequencies."""
    model = other_family("Olmo3Config", layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=48)
    rope_scaling.patch(model, "rerope")
    assert [layer.scaled for layer in installed(model.model).layers] == [False, True, False, True]


def test_texts_beyond_the_reach_are_warned_of_once():
    model = rope_scaling.patch(strong("llama"), SelfExtend(group_size=2))
    with pytest.warns(
        UserWarning, match="120 tokens exceeds the context length of self_extend .* which is 96 tokens"
    ) as told:
        logits(model, token_ids(120))
    assert Path(told[0].filename).name == "conftest.py", "where the model was called"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, token_ids(130))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("case", ["rerope", "angle_clip", "dynamic_yarn", "sliding_window"])
def test_under_autocast(family, case):
    """Training in mixed precision: weights in float32, products in bfloat16, as the model without a patch does it."""
    model = apply(strong(family), case).train()
    ids = token_ids(150)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    exact = model(**inputs).loss
    exact.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    wanted, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert abs(float(loss.detach() - exact.detach())) < 0.05
    assert float((weight.grad - wanted).norm() / wanted.norm()) < 0.1


@dataclass(frozen=True, kw_only=True)
class Fading(SpanMethod):
    """Near keys with one amplitude, far ones with another, made from each other or each on its own."""

    name = "fading"
    near: tuple[float, ...] | None = None
    far: tuple[float, ...] | None = None
    chained: bool = True

    def spans(self, rope):
        def span(first, last, amplitude, after):
            angles = rope.positions(lambda m: m * 0.5)
            amplitude = None if amplitude is None else torch.tensor(amplitude, dtype=torch.float64)
            return Span(first=first, last=last, query=angles, key=angles, amplitude=amplitude, after=after)

        near = span(lambda m: (m - 15).clamp(min=0), lambda m: m, self.near, None)
        return [near, span(torch.zeros_like, lambda m: m - 16, self.far, near if self.chained else None)]


@pytest.mark.parametrize("near", [None, (0.0, *[1.0] * 7), (0.5,) * 8])
@pytest.mark.parametrize("far", [None, (2.0,) * 8, (0.0, *[1.0] * 7)])
def test_amplitudes_of_spans_that_follow_each_other(near, far):
    """Also where a pair comes back after an amplitude of 0, from which nothing can be made."""
    found, wanted = (
        logits(rope_scaling.patch(strong("llama"), Fading(near=near, far=far, chained=chained)))
        for chained in (True, False)
    )
    assert found.isfinite().all() and torch.allclose(found, wanted, atol=1e-4)
