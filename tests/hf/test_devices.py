"""On a GPU, where there is one: patched before or after the move, and offloaded by accelerate."""

import pytest
import torch
from conftest import apply, logits, make_model, rotary, strong, token_ids
from transformers import DynamicCache

import rope_scaling
from rope_scaling.hf.compat import CACHE_NAME
from span_cases import SPAN_CASES


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_or_after_the_move(dtype):
    before = rope_scaling.patch(make_model("llama"), "yarn", factor=4).to("cuda", dtype)
    after = rope_scaling.patch(make_model("llama").to("cuda", dtype), "yarn", factor=4)
    for model in (before, after):
        assert rotary(model).inv_freq.device.type == "cuda" and rotary(model).inv_freq.dtype == torch.float32
    ids = token_ids(150).cuda()
    assert torch.equal(logits(before, ids), logits(after, ids))


def test_unpatch_gives_back_the_same_bits():
    model, ids = make_model("llama").cuda(), token_ids(150).cuda()
    original = logits(model, ids)
    rope_scaling.unpatch(rope_scaling.patch(model, "yarn", factor=4))
    assert torch.equal(logits(model, ids), original)


@pytest.mark.parametrize("case", SPAN_CASES)
def test_gradients_of_spans_on_a_gpu_are_those_of_a_cpu(case):
    gradients = []
    for device in ("cpu", "cuda"):
        model = apply(strong("llama"), case).to(device)
        ids = token_ids(150).to(device)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.cpu() for name, parameter in model.named_parameters()})
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, atol=1e-3), name


@pytest.mark.parametrize("case", SPAN_CASES)
def test_spans_on_a_gpu_are_those_of_a_cpu(case):
    model = apply(strong("llama"), case)
    ids = token_ids(150)
    wanted = logits(model, ids)
    model.to("cuda")
    found = logits(model, ids.cuda(), use_cache=False).cpu()
    assert torch.allclose(found, wanted, atol=1e-3)
    cache = DynamicCache(config=model.config, offloading=True)
    steps = [logits(model, part.cuda(), **{CACHE_NAME: cache}).cpu() for part in ids.split(50, dim=1)]
    assert torch.allclose(torch.cat(steps, dim=1), wanted, atol=1e-3)
