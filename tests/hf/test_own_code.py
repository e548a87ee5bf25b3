"""Models that bring code of their own: the command line does not run it, and `patch` takes what is built as usual."""

import json

import pytest
import torch
from conftest import logits, make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.hf.loading import load_model


@pytest.fixture
def folder(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("open('was-run', 'w')")
    return tmp_path


@pytest.mark.parametrize("load", [load_model, rope_scaling.from_pretrained])
def test_code_of_a_folder_is_not_run(load, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(RopeScalingError, match=r"has custom modelling code.*pass the model to `rope_scaling\.patch`"):
        load(str(folder))
    assert {finding.code for finding in rope_scaling.diagnose(str(folder)).findings} == {"RS114"}
    assert not (folder / "was-run").exists()


class HomemadeModel(PreTrainedModel):
    """Turns by a table of its own making."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.angles = nn.Parameter(torch.zeros(8))


class HomemadeRotaryEmbedding(LlamaRotaryEmbedding):
    """Built as Transformers builds its own."""


class HomemadeLlama(LlamaForCausalLM):
    """A Llama model whose class is not Transformers'."""

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = HomemadeRotaryEmbedding(config)


def test_other_ways_to_turn_are_refused_with_a_hint():
    with pytest.raises(RopeScalingError, match=r"Its code is not Transformers' own.*LlamaRotaryEmbedding"):
        rope_scaling.patch(HomemadeModel(PreTrainedConfig()), "yarn", factor=4)


@pytest.mark.parametrize(("method", "values"), [("yarn", {"factor": 4}), ("self_extend", {})])
def test_what_is_built_as_usual_is_patched(method, values):
    plain = make_model("llama")
    own = HomemadeLlama(LlamaConfig.from_dict(plain.config.to_dict())).eval()
    own.load_state_dict(plain.state_dict())
    wanted = logits(rope_scaling.patch(plain, method, **values))
    assert torch.equal(logits(rope_scaling.patch(own, method, **values)), wanted)
