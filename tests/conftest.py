"""Tiny random models of every supported family, made from their config classes: no network, no weights."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when Transformers is imported

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import rope_scaling
from cases import arguments_of
from span_cases import SPAN_CASES, methods_of


TRAINED_LENGTH = 64

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_NO_GROUPS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED_LENGTH,
    "rope_theta": 5e5,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED_LENGTH, "rope_theta": 1e6}

FAMILIES = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 16}),
    "phi3": ("Phi3Config", _COMMON | {"original_max_position_embeddings": TRAINED_LENGTH}),
    "gemma2": ("Gemma2Config", _COMMON | {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", _COMMON | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("GPTNeoXConfig", _NO_GROUPS | {"rotary_pct": 0.5}),
    "phi": ("PhiConfig", _COMMON | {"partial_rotary_factor": 0.5}),
    "llama3.1": ("LlamaConfig", _COMMON | {"max_position_embeddings": 8 * TRAINED_LENGTH, "rope_parameters": _LLAMA3}),
    "qwen2-yarn": ("Qwen2Config", _COMMON | {"rope_parameters": _YARN}),
}


def make_model(family, **changes):
    """A tiny random model of a family, float32, in evaluation mode; the same every time."""
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in (values | changes).items()}
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**values)).eval()


def token_ids(length, rows=1, seed=0):
    """Random token ids, `[rows, length]`."""
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None, **arguments):
    """Logits of one forward call, past the trained length unless `ids` are given."""
    return model(token_ids(150) if ids is None else ids, **arguments).logits


def close(one, other):
    """Whether logits of two instances agree; weights that lie elsewhere in memory may change the last bit."""
    return torch.allclose(one, other, atol=1e-6, rtol=0)


def rotary(model):
    """The rotary module of a bare model of any of the families."""
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def state(model):
    """Everything a patch may touch, to compare before and after."""
    return (
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        model.config.to_json_string(use_diff=False),
        [id(cls) for cls in type(rotary(model)).__mro__],
        "_rope_scaling" in vars(rotary(model)),
        {key: value for key, value in vars(rotary(model)).items() if not key.startswith("_")},
    )


def same_state(one, other):
    return all(torch.equal(one[0][name], other[0][name]) for name in one[0]) and str(one[1:]) == str(other[1:])


def strong(family, **more):
    """A random model whose attention matters: the usual tiny weights make it an average over all keys."""
    changes = {"gemma3": {"sliding_window": 48}, "mistral": {"sliding_window": 120}}
    return make_model(family, initializer_range=0.15, **changes.get(family, {}), **more)


def other_family(name, **changes):
    values = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED_LENGTH,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**values | changes)).eval()


OTHER_FAMILIES = {
    "neighbours, part of the head": lambda: other_family("GlmConfig", head_dim=16, partial_rotary_factor=0.5),
    "neighbours": lambda: other_family("CohereConfig"),
    "some layers do not rotate": lambda: other_family("SmolLM3Config"),
    "part of the head": lambda: strong("phi"),
    "learned sinks": lambda: other_family("GptOssConfig", head_dim=16, num_local_experts=4, sliding_window=32),
    "soft-capped scores": lambda: make_model("gemma2", initializer_range=0.15, sliding_window=48),
    "mixture of experts": lambda: other_family("Qwen2MoeConfig"),
}


def apply(model, case):
    """The model under a case of a method or of several, by its name in the tables of cases."""
    pairs = len(getattr(rotary(model), "inv_freq", getattr(rotary(model), "full_attention_inv_freq", None)))
    if case in SPAN_CASES:
        return rope_scaling.patch(model, *methods_of(case, pairs))
    return rope_scaling.patch(model, case, **arguments_of(case, pairs))


def left_padded(rows):
    """Ids, mask and positions of texts of several lengths, padded on the left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(width - len(row)), torch.ones(len(row))]) for row in rows]).long()
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture
def llama():
    return make_model("llama")
