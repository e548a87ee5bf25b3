"""A loaded model as its checkpoint defines it: rotary modules, configs, scaling; each read once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.configs import RECORD_KEY, rope_parameters_of, windows_of
from rope_scaling.hf.pretrained_rope import LoadedConfig, PretrainedRope, read_rope
from rope_scaling.hf.record import check_record
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.hf.skeleton import build_skeleton
from rope_scaling.hf.slot import Slot, configs_of


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model as its checkpoint defines it, whether it is patched or not. Each fact is read when it is first
    asked for, and once.
    """

    model: nn.Module
    """What was read, bare or wrapped."""
    slots: tuple[Slot, ...]
    """Its sets of rotary frequencies."""
    original_max_position_embeddings: int | None = None
    """Trained length in tokens, where it was given because the config has none or a wrong one."""
    _configs: dict[int, LoadedConfig] = field(default_factory=dict, repr=False, compare=False)
    _ropes: dict[Slot, PretrainedRope] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def config(self) -> Any:
        """The config that describes the rotary modules.

        Raises:
            RopeScalingError: there are several, and they differ.
        """
        configs = self.configs
        if len({str(rope_parameters_of(config)) for config in configs}) > 1:
            raise RopeScalingError(
                "This model has several decoders with different RoPE parameters "
                f"({', '.join(sorted({slot.path for slot in self.slots}))}). Patch the one you want, as in "
                "`patch(model.decoder, ...)`."
            )
        return configs[0]

    @property
    def configs(self) -> list[Any]:
        """The configs that the rotary modules were built from."""
        return configs_of(self.slots)

    @property
    def settings(self) -> dict[str, Any]:
        """`max_position_embeddings` and `rope_parameters` of the config before any patch.

        Raises:
            RopeScalingError: as `config`; or the record of a patch is damaged.
        """
        return self.loaded(self.config).settings

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of a patch in the config, or `None`.

        Raises:
            RopeScalingError: as `config`; or the record is damaged.
        """
        record = getattr(self.config, RECORD_KEY, None)
        return None if record is None else check_record(record)

    @property
    def in_config(self) -> bool:
        """Whether a config can state the frequencies of this model; they are in the code of some families."""
        return self.slots[0].in_config

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Names of the layer types that rotate differently, sorted; none where all layers rotate alike."""
        return tuple(sorted({slot.layer_type for slot in self.slots if slot.layer_type}))

    @cached_property
    def windows(self) -> list[int | None]:
        """The window in tokens that the config states for every layer."""
        return windows_of(self.config)

    def trained_at(self, length: int | None) -> Checkpoint:
        """The same checkpoint with another trained length, in tokens."""
        if length == self.original_max_position_embeddings:
            return self
        return replace(self, original_max_position_embeddings=length)

    def loaded(self, config: Any) -> LoadedConfig:
        """One of the model's configs, as the checkpoint states it."""
        return self._configs.setdefault(id(config), LoadedConfig(config))

    def rope(self, slot: Slot) -> PretrainedRope:
        """One of the sets of frequencies, as the checkpoint defines it.

        Raises:
            RopeScalingError: as `read_pretrained`.
        """
        if slot not in self._ropes:
            loaded = self.loaded(slot.config)
            self._ropes[slot] = read_rope(slot, loaded, self.original_max_position_embeddings)
        return self._ropes[slot]


def read_checkpoint(model: Any, original_max_position_embeddings: int | None = None) -> Checkpoint:
    """Reads a model's rotary position embedding as its checkpoint defines it.

    Args:
        model (`nn.Module` or `PreTrainedConfig`): A loaded model, patched or not, bare or wrapped; or a config, from
            which a model without weights is built.
        original_max_position_embeddings (`int`, *optional*): Trained length in tokens, for a config that has none or a
            wrong one.

    Raises:
        RopeScalingError: the model has no RoPE, or none can be built from the config.
    """
    if isinstance(model, PreTrainedConfig):
        model = build_skeleton(type(model).__name__, model)
    return Checkpoint(model, tuple(rotary_slots(model)), original_max_position_embeddings)
