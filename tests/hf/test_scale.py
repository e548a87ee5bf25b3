"""Whole models at the sizes that tiny tests leave out: several tiles, many queries a key head, bfloat16, threads."""

import threading

import pytest
import torch
from conftest import apply, logits, make_model, token_ids
from transformers import DynamicCache

from rope_scaling.attention.tiling import TILE
from rope_scaling.hf.compat import CACHE_NAME
from span_cases import SPAN_CASES


def grouped(**changes):
    """Eight query heads on one key head."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 1}
    return make_model("llama", initializer_range=0.15, **sizes, **changes)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_several_tiles_are_the_same_text_in_pieces(case):
    """A prompt of more than one tile of the kernels, and the same read with a cache in pieces that end elsewhere."""
    model, ids = apply(grouped(), case), token_ids(TILE + 300)
    whole = logits(model, ids)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in ids.split([700, 1, 40, ids.shape[1] - 741], 1):
            parts.append(model(piece, **{CACHE_NAME: cache}).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)
    alone = logits(apply(grouped(), case), ids[:, :200])
    assert torch.allclose(whole[:, :200], alone, atol=2e-4)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_bfloat16_models_lose_what_bfloat16_loses(case):
    ids = token_ids(150)
    exact, rough = logits(grouped(), ids), logits(grouped().bfloat16(), ids).float()
    usual = float((rough - exact).abs().max())
    wanted = logits(apply(grouped(), case), ids)
    found = logits(apply(grouped().bfloat16(), case), ids)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - wanted).abs().max()) < 3 * usual


@pytest.mark.parametrize("case", ["rerope", "dual_chunk", "streaming", "angle_clip-uniform", "log_n"])
def test_one_model_in_several_threads(case):
    """As servers use it: prompts of several lengths at once, each with a cache of its own, decoded token by token."""
    model = apply(make_model("llama", initializer_range=0.15), case)
    texts = [token_ids(length, seed=length) for length in (40, 90, 130, 150)]

    def decoded(ids):
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece in ids.split([ids.shape[1] - 20, *[1] * 20], 1):
                found.append(model(piece, **{CACHE_NAME: cache}).logits)
        return torch.cat(found, 1)

    alone = [decoded(ids) for ids in texts]
    together = {}
    start = threading.Barrier(len(texts))

    def work(index):
        start.wait()
        together[index] = decoded(texts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[index], wanted) for index, wanted in enumerate(alone))
