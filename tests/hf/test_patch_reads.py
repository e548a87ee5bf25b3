"""One `patch` reads a model once: its config, and Transformers' frequencies for each slot and candidate."""

from collections import Counter

import pytest
from conftest import make_model
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

import rope_scaling
from rope_scaling.hf import pretrained_rope


@pytest.fixture
def counts(monkeypatch):
    """Reads of a config, configs made from values, and tables of frequencies that Transformers computed, by type."""
    counts = Counter()

    def counted(name, function):
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    from_dict = PreTrainedConfig.from_dict.__func__
    # Transformers itself calls `to_dict` when it makes a config.
    monkeypatch.setattr(pretrained_rope, "config_values", counted("read", pretrained_rope.config_values))
    monkeypatch.setattr(PreTrainedConfig, "from_dict", classmethod(counted("made", from_dict)))
    for name, function in ROPE_INIT_FUNCTIONS.items():
        monkeypatch.setitem(ROPE_INIT_FUNCTIONS, name, counted(name, function))
    for cls in (LlamaRotaryEmbedding, Gemma3RotaryEmbedding, Phi3RotaryEmbedding):
        function = cls.compute_default_rope_parameters
        monkeypatch.setattr(cls, "compute_default_rope_parameters", staticmethod(counted("default", function)))
    return counts


LOADED = {"read": 1, "made": 1, "default": 1}
"""The config read and made once as loaded, and its frequencies."""


@pytest.mark.parametrize(
    ("family", "method", "arguments", "more"),
    [
        ("llama", "yarn", {"factor": 4}, {"made": 1, "yarn": 1}),
        ("llama", "yarn", {"target_length": 512}, {"made": 1, "yarn": 1}),
        ("llama", "ntk", {"factor": 4}, {"made": 1, "default": 1}),
        ("llama", "mrrope_pro", {"factor": 4}, {"made": 1, "longrope": 1}),
        ("gemma3", "linear", {"factor": 4}, {"made": 1, "linear": 1}),
        ("gemma3", "linear", {"factor": 4, "layer_types": "all"}, {"made": 2, "default": 1, "linear": 2}),
        ("llama", "rerope", {}, {"made": 1}),
        ("phi3", "rerope", {}, {"made": 1}),
    ],
)
def test_one_patch_reads_once(family, method, arguments, more, counts):
    model = make_model(family)
    counts.clear()
    rope_scaling.patch(model, method, **arguments)
    assert counts == Counter(LOADED) + Counter(more)


def test_a_model_that_is_loaded_scaled(counts):
    model = make_model("qwen2-yarn")
    counts.clear()
    rope_scaling.patch(model, "yarn", factor=2)
    assert counts == {"read": 1, "made": 2, "yarn": 2}


def test_a_patch_in_place_of_another(counts):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    counts.clear()
    rope_scaling.patch(model, "linear", factor=2)
    assert counts == {"read": 1, "made": 2, "default": 1, "linear": 1}


def test_describing_and_exporting_a_patched_model_reads_no_config(counts):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    counts.clear()
    rope_scaling.read_description(model)
    rope_scaling.config_overrides(model, "vllm")
    assert not counts
