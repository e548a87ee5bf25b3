"""`generate` beyond the trained length, in all its ways, gives what a model without a cache would choose."""

import copy

import pytest
import torch
from conftest import apply, left_padded, logits, make_model, strong, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import rope_scaling
from cases import METHOD_CASES
from rope_scaling import RopeScalingError, SlidingWindow
from rope_scaling.hf import cache as rotated_cache
from rope_scaling.hf.cache import rotated_copies
from rope_scaling.hf.compat import CACHE_NAME
from span_cases import SPAN_CASES


PROMPT, NEW = 90, 12


def close(one, other):
    return torch.allclose(one, other, atol=1e-4, rtol=0)


def chosen(model, ids, count):
    """Greedy continuation by one call over the whole text a token, without a cache."""
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model, ids, **arguments):
    torch.manual_seed(0)
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | arguments
    return model.generate(ids, attention_mask=arguments.pop("attention_mask", torch.ones_like(ids)), **arguments)


@pytest.mark.parametrize("case", [*METHOD_CASES, *SPAN_CASES])
def test_greedy_sampled_beams_and_batch(case):
    model = apply(strong("llama"), case)
    ids = token_ids(PROMPT)
    wanted = chosen(model, ids, NEW)
    assert torch.equal(generate(model, ids), wanted)
    assert torch.equal(generate(model, ids, use_cache=False), wanted)
    assert torch.equal(generate(model, ids, prefill_chunk_size=32), wanted)
    sampled = [generate(model, ids, do_sample=True, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*sampled)
    beams = [generate(model, ids, num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*beams)
    texts = [ids[0], token_ids(61, seed=1)[0], token_ids(7, seed=2)[0]]
    padded, mask, _ = left_padded(texts)
    batch = generate(model, padded, attention_mask=mask)[:, PROMPT:]
    for row, text in zip(batch, texts, strict=True):
        assert torch.equal(row, chosen(model, text[None], NEW)[0, len(text) :])


@pytest.mark.parametrize("case", ["rerope", "dual_chunk", "dynamic_ntk", "angle_clip-uniform", "lm_infinite", "log_n"])
def test_caches(case):
    model = apply(strong("llama"), case)
    ids = token_ids(PROMPT)
    wanted = chosen(model, ids, NEW)
    assert torch.equal(generate(model, ids, cache_implementation="static"), wanted)
    assert torch.equal(generate(model, ids, **{CACHE_NAME: StaticCache(model.config, max_cache_len=120)}), wanted)
    assert torch.equal(generate(model, ids, **{CACHE_NAME: DynamicCache(config=model.config)}), wanted)
    assert torch.equal(generate(model, ids, **{CACHE_NAME: DynamicCache()}), wanted)


class Stream:
    """In place of a device's stream, where there is no device."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, _):
        pass


def leave(layer):
    """In place of moving a layer's keys away: whoever reads them before they are back reads what is no number."""
    layer.away = layer.keys, layer.values
    layer.keys, layer.values = (torch.full_like(one, torch.nan) for one in layer.away)


def come_back(layer):
    if away := layer.__dict__.pop("away", None):
        layer.keys, layer.values = away


@pytest.mark.parametrize("case", SPAN_CASES)
def test_a_cache_that_is_moved_away_between_layers(case, monkeypatch):
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    monkeypatch.setattr(DynamicLayer, "offload", leave)
    monkeypatch.setattr(DynamicLayer, "prefetch", come_back)
    model = apply(strong("llama"), case)
    ids = token_ids(PROMPT)
    cache = DynamicCache(config=model.config, offloading=True)
    steps = [logits(model, part, **{CACHE_NAME: cache}) for part in ids.split([70, 1, 15, 4], dim=1)]
    assert cache.layers[-1].keys.isnan().all()
    assert close(torch.cat(steps, dim=1), logits(model, ids, use_cache=False))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_static_caches_of_models_with_windows_of_their_own(family):
    model = apply(strong(family), "rerope")
    ids = token_ids(PROMPT)
    assert torch.equal(generate(model, ids, cache_implementation="static"), chosen(model, ids, NEW))


@pytest.mark.parametrize("case", ["self_extend", "sliding_window-sinks", "dynamic_yarn"])
def test_assisted_decoding(case):
    model, assistant = apply(strong("llama"), case), strong("llama")
    ids = token_ids(PROMPT)
    assert torch.equal(generate(model, ids, assistant_model=assistant), chosen(model, ids, NEW))
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=5), chosen(model, ids, NEW))


@pytest.mark.parametrize("case", ["rerope", "streaming", "dynamic_ntk"])
def test_a_cache_is_reused_cropped_and_copied(case):
    """What the engine keeps beside a cache follows whatever is done to it."""
    model = apply(strong("llama"), case)
    ids = token_ids(130)
    wanted = logits(model, ids, use_cache=False)

    @torch.no_grad()
    def go_on(cache, start, stop):
        return torch.cat(
            [model(ids[:, at : at + 1], **{CACHE_NAME: cache}).logits for at in range(start, stop)], dim=1
        )

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :80], **{CACHE_NAME: cache})
    assert close(go_on(cache, 80, 100), wanted[:, 80:100])
    other = copy.deepcopy(cache)
    assert close(go_on(cache, 100, 110), wanted[:, 100:110])
    cache.crop(-15)
    assert close(go_on(cache, 95, 110), wanted[:, 95:110])
    assert close(go_on(other, 100, 110), wanted[:, 100:110])
    cache.reset()
    # Older versions fill a growing cache with zeros in place of emptying it.
    if cache.get_seq_length():
        cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert close(model(ids[:, :50], **{CACHE_NAME: cache}).logits, wanted[:, :50])
    assert close(go_on(cache, 50, 70), wanted[:, 50:70])
    cache.batch_repeat_interleave(3)
    with torch.no_grad():
        out = model(ids[:, 70:71].expand(3, -1), **{CACHE_NAME: cache}).logits
    assert close(out, wanted[:, 70:71].expand(3, -1, -1))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_is_used_again_for_a_text_of_the_same_length(guard):
    """Its tensors are the same objects, and in inference mode nothing counts their changes."""
    model = apply(strong("llama"), "rerope")
    cache = StaticCache(model.config, max_cache_len=160)
    with guard():
        for seed, first in ((0, 100), (1, 101)):
            ids = token_ids(104, seed=seed)
            wanted = model(ids, use_cache=False).logits
            outs = [model(ids[:, :first], **{CACHE_NAME: cache}).logits]
            while first < (101 if seed == 0 else 104):
                outs.append(model(ids[:, first : first + 1], **{CACHE_NAME: cache}).logits)
                first += 1
            assert close(torch.cat(outs, dim=1), wanted[:, :first])
            cache.reset()


def test_a_cache_that_forgot_too_much_for_another_patch():
    model = apply(strong("llama"), "streaming")
    ids = token_ids(200)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE_NAME]
        apply(model, "rerope")
        with pytest.raises(RopeScalingError, match="filled under another patch and holds the first 4 and the last 28"):
            model(ids[:, :1], **{CACHE_NAME: cache})


def test_windows_keep_a_cache_of_constant_size():
    model = apply(strong("llama"), "streaming")
    sizes = []
    cache = DynamicCache(config=model.config)
    ids = token_ids(400)
    wanted = logits(model, ids, use_cache=False)
    with torch.no_grad():
        for at in range(400):
            out = model(ids[:, at : at + 1], **{CACHE_NAME: cache}).logits
            assert (out[0, 0] - wanted[0, at]).abs().max() < 1e-4
            sizes.append(cache.layers[0].keys.shape[-2])
    assert max(sizes) <= 4 + 28 + 64 + 14 and cache.get_seq_length() == 400
    with pytest.raises(RopeScalingError, match="300 cannot be taken back"):
        cache.crop(-300)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_rotated_keys_take_at_most_one_copy_of_the_cache(case):
    """Of every span only the keys that the next query sees there are kept: together they are the keys of the cache."""
    model = apply(strong("llama"), case)
    ids = token_ids(1200)
    cache, most = DynamicCache(config=model.config), 0.0
    with torch.no_grad():
        model(ids[:, :900], **{CACHE_NAME: cache})
        for at in range(900, 1200, 5):
            model(ids[:, at : at + 5], **{CACHE_NAME: cache})
            most = max(most, rotated_copies(cache))
    assert most <= 1.25
    with torch.no_grad():
        found = model(ids[:, -1:], **{CACHE_NAME: cache}).logits
    assert torch.allclose(found, logits(model, torch.cat([ids, ids[:, -1:]], 1))[:, -1:], atol=1e-4)


def test_nothing_is_kept_beside_a_quantized_cache():
    """Rotated keys in full precision would take the memory that quantization saves."""

    class SomeQuantizedLayer(DynamicLayer):
        pass

    model, ids = apply(strong("llama"), "rerope"), token_ids(120)
    cache = DynamicCache(config=model.config)
    cache.layers = [SomeQuantizedLayer() for _ in cache.layers]
    with torch.no_grad():
        model(ids[:, :110], **{CACHE_NAME: cache})
        found = model(ids[:, 110:], **{CACHE_NAME: cache}).logits
    assert rotated_copies(cache) == 0
    assert torch.allclose(found, logits(model, ids)[:, 110:], atol=1e-5)


class Multiplied(TorchDispatchMode):
    """Counts the numbers that elementwise products give, which is what rotating keys takes."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket.__name__ in ("mul", "mul_", "addcmul", "addcmul_"):
            self.count += out.numel()
        return out


def test_rotated_keys_are_rotated_once():
    """Decoding does not rotate the whole cache again at every token: a step costs the same at any context."""
    model, ids = apply(strong("llama"), "rerope"), token_ids(1205)
    counts = []
    for length in (200, 1200):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :length], **{CACHE_NAME: cache})
            for at in range(length, length + 4):
                model(ids[:, at : at + 1], **{CACHE_NAME: cache})
            with Multiplied() as multiplied:
                model(ids[:, length + 4 : length + 5], **{CACHE_NAME: cache})
        counts.append(multiplied.count)
    assert 0 < counts[1] <= 1.1 * counts[0]


def test_a_window_wider_than_the_text_is_no_window():
    model = strong("llama")
    plain = logits(model)
    assert close(logits(rope_scaling.patch(model, SlidingWindow(window=1000, num_sinks=2))), plain)


def test_make_model_is_unchanged_by_patches_of_other_instances():
    plain = logits(make_model("llama"))
    one, other = apply(make_model("llama"), "rerope"), apply(make_model("llama"), "dual_chunk")
    first, second = logits(one), logits(other)
    assert not close(first, second)
    assert torch.equal(logits(one), first)
    assert close(logits(make_model("llama")), plain)


def test_without_memory_for_rotated_keys_decoding_goes_on_and_says_so(monkeypatch):
    model = apply(strong("llama"), "rerope")
    ids = token_ids(150)
    wanted = logits(model, ids, use_cache=False)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rotated_cache._Buffer, "make_room", no_memory)
    rotated_cache._warn_of_memory.cache_clear()
    filled = DynamicCache(config=model.config)
    with pytest.warns(UserWarning, match="No memory to keep rotated keys beside the cache on cpu"):
        outs = [logits(model, part, **{CACHE_NAME: filled}) for part in ids.split([100, *[1] * 50], dim=1)]
    assert torch.allclose(torch.cat(outs, dim=1), wanted, atol=1e-4)
    assert rotated_copies(filled) == 0
