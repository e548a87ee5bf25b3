"""The chunked loss: values and gradients of the stock one, whatever the model does to its logits."""

import pytest
import torch
from conftest import _COMMON, FAMILIES, make_model, strong, token_ids
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig
from transformers.loss.loss_utils import ForCausalLMLoss

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.training import chunked_cross_entropy


def scaled(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {name: (lambda name=name: strong(name)) for name in FAMILIES} | {
    "cohere": lambda: scaled(CohereConfig(**_COMMON, logit_scale=0.25, initializer_range=0.15)),
    "granite": lambda: scaled(GraniteConfig(**_COMMON, logits_scaling=3.0, initializer_range=0.15)),
    "gemma2-capped": lambda: make_model("gemma2", initializer_range=0.3, final_logit_softcapping=2.0),
    "llama-untied": lambda: make_model("llama", tie_word_embeddings=False, initializer_range=0.15),
    "llama-tied": lambda: make_model("llama", tie_word_embeddings=True, initializer_range=0.15),
}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def compare(model, chunk_size, **inputs):
    """Stock first, then in chunks, with the same weights."""
    wanted, wanted_gradients = loss_and_gradients(model, **inputs)
    rope_scaling.use_chunked_loss(model, chunk_size)
    found, gradients = loss_and_gradients(model, **inputs)
    rope_scaling.remove_chunked_loss(model)
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(
            gradient, wanted_gradients[name], atol=1e-5 * float(wanted_gradients[name].abs().max())
        ), name
    assert torch.equal(loss_and_gradients(model, **inputs)[0], wanted)  # taken back


def labels_of(ids):
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 20:] = -100
    return labels


@pytest.mark.parametrize("name", MODELS)
def test_families(name):
    ids = token_ids(50, rows=2)
    compare(MODELS[name](), 16, input_ids=ids, labels=labels_of(ids))


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunk_sizes_and_items_in_batch(chunk_size):
    ids = token_ids(50, rows=2)
    model = strong("llama").train()
    for items in (None, 31, torch.tensor(31)):
        extra = {} if items is None else {"num_items_in_batch": items}
        compare(model, chunk_size, input_ids=ids, labels=labels_of(ids), **extra)


def test_shifted_labels_as_sequence_parallelism_gives_them():
    ids = token_ids(40)
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    compare(strong("llama"), 16, input_ids=ids, labels=ids, shift_labels=shifted)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters(target):
    """An adapted head too: the loss goes through the head as it is."""
    ids = token_ids(40)
    model = get_peft_model(strong("llama"), LoraConfig(target_modules=target, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    compare(model, 16, input_ids=ids, labels=ids)


def test_nothing_counts():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    head = torch.nn.Linear(8, 16)
    loss = chunked_cross_entropy(hidden, head, torch.full((1, 4), -100), num_items_in_batch=1)
    loss.backward()
    assert float(loss.detach()) == 0 and head.weight.grad is not None


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 600, 32).bfloat16(), torch.nn.Linear(32, 500, bias=False).bfloat16()
    labels = torch.randint(500, (1, 600))
    wanted = ForCausalLMLoss(head(hidden), None, 500, shift_labels=labels)
    found = chunked_cross_entropy(hidden, head, labels, chunk_size=64)
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, rtol=1e-5)


def test_without_labels_the_model_gives_logits():
    model = strong("llama")
    ids = token_ids(20)
    with torch.no_grad():
        wanted = model(ids).logits
        rope_scaling.use_chunked_loss(model)
        assert torch.equal(model(ids).logits, wanted)
        assert model(ids, labels=ids).logits is None
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_a_model_with_a_loss_of_its_own_is_refused():
    model = strong("llama")
    head = model.lm_head.forward
    stock = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = stock(self, *args, **kwargs)
            if out.loss is not None:
                out.loss = 2 * out.loss
            return out

    model.__class__ = Odd
    with pytest.raises(RopeScalingError, match="computes its loss differently"):
        rope_scaling.use_chunked_loss(model)
    assert model.lm_head.forward == head and "forward" not in vars(model)


def test_bad_input():
    with pytest.raises(RopeScalingError, match="no separate decoder and language-model head"):
        rope_scaling.use_chunked_loss(strong("llama").model)
    with pytest.raises(RopeScalingError, match="at least 1; got 0"):
        rope_scaling.use_chunked_loss(strong("llama"), 0)
    with pytest.raises(RopeScalingError, match="nothing to revert"):
        rope_scaling.remove_chunked_loss(strong("llama"))
