"""Span methods under `torch.compile`: whole graphs where attention is FlexAttention, one break a layer elsewhere.

FlexAttention compiles on a GPU. Its dense form stands for it here, so the tracer takes the graph whole, and it runs.
"""

import pytest
import torch
from conftest import OTHER_FAMILIES, apply, close, left_padded, logits, make_model, strong, token_ids
from transformers import DynamicCache, StaticCache

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.hf import compiled
from rope_scaling.hf.compat import CACHE_NAME


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture
def whole(monkeypatch):
    """Compiles a model as on a GPU, and refuses any graph break."""
    monkeypatch.setattr(compiled, "TRACED_DEVICES", {"cpu", "cuda"})
    torch._dynamo.reset()
    return lambda model, backend="eager": torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("case", ["rerope+log_n", "waveprune", "dynamic_yarn", "yarn+window+llama4"])
def test_one_graph(case, whole):
    model = apply(strong("llama"), case)
    wanted = logits(model)
    assert torch.allclose(logits(whole(model), use_cache=False), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["neighbours, part of the head", "learned sinks", "soft-capped scores"])
def test_one_graph_of_other_families(name, whole):
    model = OTHER_FAMILIES[name]()
    rope_scaling.patch(model, "rerope", window=20)
    wanted = logits(model)
    assert torch.allclose(logits(whole(model, "aot_eager"), use_cache=False), wanted, atol=1e-4)


def test_padding_and_documents_in_one_graph(whole):
    model = apply(strong("llama"), "rerope")
    compiled = whole(model)
    texts = [token_ids(length, seed=length)[0] for length in (150, 90, 61)]
    ids, mask, _ = left_padded(texts)
    for row, text in zip(logits(compiled, ids, attention_mask=mask, use_cache=False), texts, strict=True):
        assert torch.allclose(row[-len(text) :], logits(model, text[None])[0], atol=1e-4)
    packed, positions = torch.cat(texts[1:])[None], torch.cat([torch.arange(90), torch.arange(61)])[None]
    found = logits(compiled, packed, position_ids=positions, use_cache=False)
    assert torch.allclose(found[:, 90:], logits(model, texts[2][None]), atol=1e-4)
    with pytest.raises(RopeScalingError, match=r"`position_ids` restart or skip ahead.* Leave the cache out"):
        logits(compiled, packed, position_ids=positions, **{CACHE_NAME: DynamicCache(config=model.config)})


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("llama", DynamicCache),
        ("llama", StaticCache),
        pytest.param("gemma3", DynamicCache, marks=pytest.mark.slow),
    ],
)
def test_caches_in_one_graph(family, make, whole):
    model, ids = apply(strong(family), "rerope"), token_ids(150)
    compiled = whole(model)
    cache = make(config=model.config, **({"max_cache_len": 160} if make is StaticCache else {}))
    steps = [logits(compiled, piece, **{CACHE_NAME: cache}) for piece in ids.split([100, 49, 1], dim=1)]
    assert torch.allclose(torch.cat(steps, 1), logits(model, ids), atol=1e-4)


@pytest.mark.skipif(TORCH < (2, 12), reason="Dynamo of torch 2.11 cannot raise an exception of ours from a graph")
def test_what_a_graph_cannot_hold_is_said(whole):
    model = apply(strong("llama"), "rerope").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(RopeScalingError, match=r"Attention dropout \(0\.1\) does not go through FlexAttention"):
        logits(torch.compile(model, backend="eager"), use_cache=False)
    with pytest.raises(RopeScalingError, match="never stores its probabilities"):
        logits(torch.compile(apply(strong("llama"), "rerope"), backend="eager"), output_attentions=True)


def test_a_graph_break_at_attention_on_a_cpu():
    torch._dynamo.reset()
    model = apply(strong("llama"), "angle_clip")
    wanted = logits(model)
    compiled = torch.compile(model, backend="eager")
    assert close(logits(compiled), wanted)
    assert close(logits(compiled, token_ids(99)), logits(model, token_ids(99)))


def test_a_new_patch_is_compiled_anew(whole):
    model = make_model("llama", initializer_range=0.15)
    compiled = whole(rope_scaling.patch(model, "rerope"))
    logits(compiled, use_cache=False)
    rope_scaling.patch(model, "self_extend", group_size=4)
    assert torch.allclose(logits(compiled, use_cache=False), logits(model), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
@pytest.mark.parametrize("case", ["rerope", "angle_clip", "dynamic_yarn", "sliding_window-sinks"])
def test_the_default_compiler_on_a_gpu_forward_and_backward(case):
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        model = apply(strong("llama"), case).cuda()
        ids = token_ids(256).cuda()
        loss = (torch.compile(model, fullgraph=True) if compiles else model)(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)
    for name, wanted in found[0][1].items():
        assert torch.allclose(found[1][1][name], wanted, atol=1e-3), name
