"""One answer: for every method and family, every way of running a text gives the logits of one call over it."""

import pytest
import torch
from attention_twins import use_twin
from conftest import apply, left_padded, logits, strong, token_ids

import rope_scaling
from cases import METHOD_CASES
from rope_scaling import METHODS, RopeScalingError
from rope_scaling.hf.compat import CACHE_NAME
from span_cases import SPAN_CASES, methods_of


FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "phi3"]
LENGTH = 170  # 2.7 times the trained length
SHORTER = [97, 40]
TOLERANCE = 1e-4
STEPS = [40, 7, *[1] * 30, 60, *[1] * 10, 23]


@torch.no_grad()
def in_steps(model, ids, steps, **arguments):
    cache, outs, start = None, [], 0
    for step in steps:
        out = model(ids[:, start : start + step], **{CACHE_NAME: cache}, use_cache=True, **arguments)
        cache, start = out[CACHE_NAME], start + step
        outs.append(out.logits)
    assert start == ids.shape[1]
    return torch.cat(outs, dim=1)


def difference(one, other):
    return (one - other).abs().max().item()


def test_every_method_is_held_to_it():
    named = {method.name for case in SPAN_CASES for method in methods_of(case, 8)}
    assert named | set(METHOD_CASES) == set(METHODS)


@pytest.mark.parametrize("case", [*METHOD_CASES, *SPAN_CASES])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer(family, case):
    model = strong(family)
    before = logits(model, token_ids(LENGTH))
    apply(model, case)
    texts = [token_ids(length, seed=length)[0] for length in (LENGTH, *SHORTER)]
    alone = [logits(model, text[None], use_cache=False)[0] for text in texts]
    assert all(torch.isfinite(one).all() for one in alone)
    assert difference(logits(model, token_ids(LENGTH)), before) > TOLERANCE, "the method does nothing"

    check_one_answer(model, texts, alone, case)


def check_one_answer(model, texts, alone, case):
    assert difference(logits(model, texts[0][None])[0], alone[0]) == 0, "with a cache to fill"
    assert difference(in_steps(model, texts[0][None], STEPS)[0], alone[0]) < TOLERANCE, "in steps"

    ids, mask, positions = left_padded(texts)
    batch = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, one in zip(batch, alone, strict=True):
        assert difference(row[-len(one) :], one) < TOLERANCE, "padded on the left"

    packed = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    # Transformers keeps packed documents apart if there is no cache to fill; a patched attention always does.
    cache = {} if case in SPAN_CASES else {"use_cache": False}
    found = logits(model, packed, position_ids=positions, **cache)[0].split([len(text) for text in texts])
    for part, one in zip(found, alone, strict=True):
        assert difference(part, one) < TOLERANCE, "packed"

    assert difference(logits(model, texts[2][None], use_cache=False)[0], alone[2]) == 0, "after longer calls"


@pytest.mark.parametrize("case", SPAN_CASES)
@pytest.mark.parametrize("twin", ["flash", "cudnn"])
def test_one_answer_of_the_engine_for_gpus(twin, case, monkeypatch):
    """Through twins of the CUDA kernels: the same as the engine for CPUs gives, in every way of running a text."""
    model = apply(strong("llama" if twin == "cudnn" else "mistral"), case)
    texts = [token_ids(length, seed=length)[0] for length in (LENGTH, *SHORTER)]
    alone = [logits(model, text[None], use_cache=False)[0] for text in texts]
    use_twin(monkeypatch, twin)
    assert "FlashAttention" not in str(rope_scaling.read_description(model))
    for text, wanted in zip(texts, alone, strict=True):
        assert difference(logits(model, text[None], use_cache=False)[0], wanted) < TOLERANCE
    assert "FlashAttention on cpu" in str(rope_scaling.read_description(model)), "what ran is said"
    check_one_answer(model, texts, [logits(model, text[None], use_cache=False)[0] for text in texts], case)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_a_padded_batch_in_steps_whatever_positions_the_caller_counts(case):
    model = apply(strong("llama"), case)
    texts = [token_ids(length, seed=length)[0] for length in (LENGTH, *SHORTER)]
    alone = [logits(model, text[None], use_cache=False)[0] for text in texts]
    ids, mask, positions = left_padded(texts)
    for given in ({}, {"position_ids": positions}):
        cache, outs, start = None, [], 0
        for step in (140, 1, 1, 20, *[1] * 8):
            end = start + step
            some = {name: value[:, start:end] for name, value in given.items()}
            with torch.no_grad():
                more = {"attention_mask": mask[:, :end], CACHE_NAME: cache, "use_cache": True}
                out = model(ids[:, start:end], **more, **some)
            cache, start = out[CACHE_NAME], end
            outs.append(out.logits)
        for row, one in zip(torch.cat(outs, dim=1), alone, strict=True):
            assert difference(row[-len(one) :], one) < TOLERANCE


def test_what_cannot_hold_it_refuses():
    model = apply(strong("llama"), "rerope")
    cache = model(token_ids(20), use_cache=True)[CACHE_NAME]
    packed = torch.cat([torch.arange(5), torch.arange(5)])[None]
    with pytest.raises(RopeScalingError, match="restart or skip ahead in a call on top of a cache"):
        model(token_ids(10), **{CACHE_NAME: cache}, position_ids=packed)
