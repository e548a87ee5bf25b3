"""RoFormer: angles in a table of sines and cosines, a row for every position, that is saved with the weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rope_scaling.hf.rotary import Slot, remember


_MODULE = "RoFormerSinusoidalPositionalEmbedding"
_MODEL_TYPE = "roformer"
_AS_TRAINED = {"rope_type": "default", "rope_theta": 10000.0}
"""What RoFormer's code computes its table from; its config states nothing."""


@dataclass(frozen=True)
class TableSlot(Slot):
    """Frequencies in the form of a table. A patch computes the table anew, with a row for every new position."""

    owner: Any = field(default=None, compare=False)
    """The config that the table was built from."""

    @property
    def config(self) -> Any:
        """As of every slot."""
        return self.owner

    @property
    def inv_freq(self) -> torch.Tensor:
        """The angles of position 1, `[R / 2]`, float32."""
        sine, cosine = self.module.weight.detach()[1].float().chunk(2)
        return torch.atan2(sine, cosine)

    @property
    def attention_factor(self) -> float:
        """The cosine of position 0."""
        return 1.0 if self.module.weight.is_meta else float(self.module.weight[0, -1])

    @property
    def rope_type(self) -> str:
        """The table does not change with the length of the call."""
        return "default"

    def set(self, inv_freq: torch.Tensor, attention_factor: float, length: int) -> None:
        """As of every slot; the table gets `length` rows."""
        remember(self.module, "weight", "num_embeddings")
        self._write(inv_freq, attention_factor, length)

    def load(self, inv_freq: torch.Tensor, attention_factor: float, rope_parameters: dict[str, Any]) -> None:
        """As of every slot."""
        self._write(inv_freq, attention_factor, self.config.max_position_embeddings)

    def holds(self, inv_freq: torch.Tensor, attention_factor: float) -> bool:
        """As of every slot."""
        wanted = _table(inv_freq, attention_factor, len(self.module.weight)).to(self.module.weight)
        return torch.equal(self.module.weight, wanted)

    def default_frequencies(self, config: Any, **_: Any) -> tuple[torch.Tensor, float]:
        """What RoFormer's own code computes, with the base of `config.rope_parameters`."""
        width = config.hidden_size // config.num_attention_heads
        base = rope_parameters_of(config)["rope_theta"]
        return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width), 1.0

    def _write(self, inv_freq: torch.Tensor, attention_factor: float, rows: int) -> None:
        weight = self.module.weight
        table = _table(inv_freq, attention_factor, rows).to(device=weight.device, dtype=weight.dtype)
        self.module.weight = nn.Parameter(table, requires_grad=False)
        self.module.num_embeddings = rows


def table_slots(model: nn.Module) -> list[Slot]:
    """The tables of a model, one for every decoder or encoder in it."""
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__ == _MODULE]
    around = [path.rpartition(".")[0].rpartition(".")[0] for path, _ in found]
    return [
        TableSlot(path, module, None, outer, model.get_submodule(outer).config)
        for (path, module), outer in zip(found, around, strict=True)
    ]


def rope_parameters_of(config: Any) -> Any:
    """`config.rope_parameters`, or what stands for them in a model whose config has none."""
    stated = getattr(config, "rope_parameters", None)
    if stated is None and getattr(config, "model_type", None) == _MODEL_TYPE:
        return copy.deepcopy(_AS_TRAINED)
    return stated


def _table(inv_freq: torch.Tensor, attention_factor: float, rows: int) -> torch.Tensor:
    """Sines in the first half of every row, cosines in the second, `[rows, R]`, float32."""
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * inv_freq.double().cpu()
    return (attention_factor * torch.cat((angles.sin(), angles.cos()), dim=1)).float()
