"""RoFormer, GPT-J, CodeGen: angles in a table of sines and cosines, with a row for every position."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rope_scaling.hf.configs import rope_parameters_of
from rope_scaling.hf.slot import Slot, decoder_around, remember


_TABLES = {
    "RoFormerSinusoidalPositionalEmbedding": "weight",
    "GPTJAttention": "embed_positions",
    "GPTJRotaryEmbedding": "embed_positions",
    "CodeGenAttention": "embed_positions",
    "CodeGenRotaryEmbedding": "embed_positions",
}
"""Classes that hold a table, and the name of it in them; GPT-J's and CodeGen's was in attention before 5.24."""


@dataclass(frozen=True)
class TableSlot(Slot):
    """Frequencies in the form of a table. A patch computes the table again, with a row for every new position, in the
    precision of the model, as Transformers keeps it.
    """

    owner: Any = field(default=None, compare=False)
    """The decoder, whose config the table was built from."""

    @property
    def config(self) -> Any:
        """As of every slot."""
        return self.owner.config

    @property
    def in_config(self) -> bool:
        """RoFormer saves its table with the weights; the others compute it from the config's length alone."""
        return self._name == "weight"

    @property
    def table(self) -> torch.Tensor:
        """Sines in the first half of every row, cosines in the second, `[T, R]`."""
        return getattr(self.module, self._name).detach()

    @property
    def inv_freq(self) -> torch.Tensor:
        """The angles of position 1, `[R / 2]`, as exact as the table has them."""
        sine, cosine = self.table[1].float().chunk(2)
        return torch.atan2(sine, cosine).to(self.table.dtype)

    @property
    def attention_factor(self) -> float:
        """The cosine of position 0."""
        return 1.0 if self.table.is_meta else float(self.table[0, -1])

    @property
    def rope_type(self) -> str:
        """The table does not change with the length of the call."""
        return "default"

    def set(self, inv_freq: torch.Tensor, attention_factor: float, length: int) -> None:
        """As of every slot; the table gets `length` rows, or keeps its own number where that is more."""
        remember(self.module, self._name, *(["num_embeddings"] if self.in_config else []))
        self._write(inv_freq, attention_factor, max(length, len(self.table)))

    def load(self, inv_freq: torch.Tensor, attention_factor: float, rope_parameters: dict[str, Any]) -> None:
        """As of every slot; a table that no checkpoint can change is the pretrained one already."""
        if self.in_config:
            self._write(inv_freq, attention_factor, self.config.max_position_embeddings)

    def in_use(self) -> tuple[Any, ...]:
        """As of every slot."""
        table = getattr(self.module, self._name)
        return table, None if table.is_inference() else table._version

    def holds(self, inv_freq: torch.Tensor, attention_factor: float) -> bool:
        """As of every slot."""
        return torch.equal(self.table, _table(inv_freq, attention_factor, len(self.table)).to(self.table))

    def default_frequencies(self, config: Any, **_: Any) -> tuple[torch.Tensor, float]:
        """What the family's own code computes, with the base of `config.rope_parameters`."""
        width = self.table.shape[-1]
        base = rope_parameters_of(config)["rope_theta"]
        return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width), 1.0

    def ends_at(self, length: int) -> bool:
        """Whether the table is computed for a length and has no rows beyond this one, in tokens."""
        return not self.in_config and len(self.table) <= length

    def lengthen(self, length: int) -> None:
        """Rows for `length` positions at the frequencies in use; those that are there stay as they are."""
        rows = _table(self.default_frequencies(self.config)[0], 1.0, length).to(self.table)
        self.module.embed_positions = torch.cat((self.table, rows[len(self.table) :]))

    @property
    def _name(self) -> str:
        return str(_table_name(self.module))

    def _write(self, inv_freq: torch.Tensor, attention_factor: float, rows: int) -> None:
        table = _table(inv_freq, attention_factor, rows).to(self.table)
        if not self.in_config:
            self.module.embed_positions = table
            return
        self.module.weight = nn.Parameter(table, requires_grad=False)
        self.module.num_embeddings = rows


def table_slots(model: nn.Module) -> list[TableSlot]:
    """The tables of a model: one for a decoder or encoder, or one for each of its layers."""
    slots: list[TableSlot] = []
    for path, module in model.named_modules():
        name = _table_name(module)
        if name is not None and hasattr(module, name):
            outer = decoder_around(model, path)
            slots.append(TableSlot(path, module, None, outer, model.get_submodule(outer)))
    return slots


def lengthen_tables(model: nn.Module, length: int) -> None:
    """Lets an unpatched model with tables for `max_position_embeddings` positions (GPT-J, CodeGen) read further at the
    frequencies it has, as a model without tables can.

    Args:
        model (`nn.Module`): The model; its config and what `save_pretrained` writes do not change.
        length (`int`): Tokens that it is to read.
    """
    for slot in table_slots(model):
        if slot.ends_at(length - 1):
            slot.lengthen(length)


def _table_name(module: nn.Module) -> str | None:
    return next((_TABLES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _TABLES), None)


def _table(inv_freq: torch.Tensor, attention_factor: float, rows: int) -> torch.Tensor:
    """Sines in the first half of every row, cosines in the second, `[rows, R]`, float32."""
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * inv_freq.double().cpu()
    return (attention_factor * torch.cat((angles.sin(), angles.cos()), dim=1)).float()
