"""The configs that describe a model's rotary modules, and the attributes of them that a patch writes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.older_keys import keep_older_keys
from rope_scaling.hf.pretrained import RECORD_KEY
from rope_scaling.hf.record import ACTIVATION_KEYS
from rope_scaling.hf.rotary import Slot
from rope_scaling.hf.tables import rope_parameters_of


_ATTRIBUTES = ("rope_parameters", "max_position_embeddings", *ACTIVATION_KEYS, RECORD_KEY)
_LEFT_BEHIND = ("original_max_position_embeddings",)
"""What config classes add of themselves when a patched config is validated (PhiMoE)."""


def config_of(slots: list[Slot]) -> Any:
    """The config that describes a model's rotary modules.

    Raises:
        RopeScalingError: there are several, and they differ.
    """
    configs = {id(slot.config): slot.config for slot in slots}
    if len({str(rope_parameters_of(config)) for config in configs.values()}) > 1:
        raise RopeScalingError(
            "This model has several decoders with different RoPE parameters "
            f"({', '.join(sorted({slot.path for slot in slots}))}). Patch the one you want, as in "
            "`patch(model.decoder, ...)`."
        )
    return next(iter(configs.values()))


def own_configs(model: nn.Module) -> None:
    """Gives a model config objects of its own, so that what is written there reaches no model that was built from the
    same ones. All references within the model to one config go to one copy."""
    memo: dict[int, Any] = {}
    for module in _around(model):
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)


def _around(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model and of those that hold it, which save the config that their decoder has."""
    held = [model]
    if isinstance(model, PreTrainedModel) and model.base_model is model:
        # A module does not know what holds it.
        alive = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_modules" in vars(one)]
        for inner in held:
            held += [one for one in alive if any(child is inner for child in one._modules.values())]
    yield from {id(module): module for outer in held for module in outer.modules()}.values()


def config_state(config: Any) -> dict[str, Any]:
    """Copies of the attributes that a patch writes; those that the config does not have are absent."""
    names = _ATTRIBUTES + _LEFT_BEHIND
    return {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}


def set_config(model: nn.Module, slots: list[Slot], values: dict[str, Any], whole: bool = False) -> None:
    """Writes the attributes into every config that describes these slots, so that whichever is saved is right.

    Args:
        model (`nn.Module`): The model.
        slots (`list[Slot]`): Its slots.
        values (`dict[str, Any]`): The attributes.
        whole (`bool`): Whether they are all that `config_state` gave; the rest is taken away then.
    """
    configs = {id(slot.config): slot.config for slot in slots}
    parameters = str(rope_parameters_of(config_of(slots)))
    for module in model.modules():
        config = getattr(module, "config", None)
        text: Any = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
        if text is not None and str(rope_parameters_of(text)) == parameters:
            configs[id(text)] = text
    for config in configs.values():
        for name in _ATTRIBUTES:
            if name in values:
                setattr(config, name, copy.deepcopy(values[name]))
            elif name == RECORD_KEY and hasattr(config, name):
                delattr(config, name)
        for name in config_state(config).keys() - values.keys() if whole else ():
            delattr(config, name)
        keep_older_keys(config)
