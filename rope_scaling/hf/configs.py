"""The config of a language model: where its RoPE settings are, and the attributes of it that a patch writes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rope_scaling.hf.compat import layer_configs
from rope_scaling.hf.record import ACTIVATION_KEYS
from rope_scaling.hf.save_guard import is_guarded
from rope_scaling.hf.transformers_v4 import (
    EXPORT_KEY,
    FULL,
    OLDER_KEYS,
    V4,
    in_older_form,
    is_reworded,
    older_keys,
    read_by_v4,
)


RECORD_KEY = "rope_scaling_patch"
"""Where a patched model's config keeps the record of the patch."""

_ATTRIBUTES = ("rope_parameters", "max_position_embeddings", *ACTIVATION_KEYS, RECORD_KEY)
_LEFT_BEHIND = ("original_max_position_embeddings",)
"""What config classes add of themselves when a patched config is validated (PhiMoE)."""
_UNSTATED = {"rope_type": "default", "rope_theta": 10000.0}
"""The RoPE settings that RoFormer, GPT-J and CodeGen have in their code; their configs state nothing."""
_UNSTATED_IN = ("roformer", "gptj", "codegen")


def rope_parameters_of(config: Any) -> Any:
    """`config.rope_parameters`, or those in the code of a family whose config has none."""
    stated = getattr(config, "rope_parameters", None)
    if stated is None and getattr(config, "model_type", None) in _UNSTATED_IN:
        return copy.deepcopy(_UNSTATED)
    return stated


def text_config(config: Any) -> Any:
    """The config of the language model; of the decoder, where an encoder of texts has one too."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def windows_of(config: Any) -> list[int | None]:
    """The window in tokens that the config states for every layer."""
    return [
        getattr(layer, "sliding_window", None) if getattr(layer, "use_sliding_window", True) else None
        for layer in layer_configs(config)
    ]


def state_trained_length(config: Any, length: int) -> None:
    """Writes a trained length into the RoPE settings of a config, flat or by layer type, where it has such settings.

    Args:
        config (`PreTrainedConfig` or `dict`): A language model's config, or what its `config.json` holds; changed.
        length (`int`): In tokens.
    """
    for key in ("rope_scaling", "rope_parameters"):
        stated: Any = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
        for part in [value for value in (stated or {}).values() if isinstance(value, dict)] or [stated]:
            if part:
                part["original_max_position_embeddings"] = length


def own_configs(model: nn.Module) -> None:
    """Gives a model config objects of its own, so that what is written there changes no model that was built from the
    same ones. All references within the model to one config go to one copy."""
    memo: dict[int, Any] = {}
    for module in _around(model):
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)


def _around(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model and of those that contain it, which save the config that their decoder has."""
    outermost = [model]
    if isinstance(model, PreTrainedModel) and model.base_model is model:
        # A module does not know what contains it.
        modules = [item for item in gc.get_objects() if issubclass(type(item), nn.Module) and "_modules" in vars(item)]
        for inner in outermost:
            outermost += [outer for outer in modules if any(child is inner for child in outer._modules.values())]
    yield from {id(module): module for outer in outermost for module in outer.modules()}.values()


def config_state(config: Any) -> dict[str, Any]:
    """Copies of the attributes that a patch writes; those that the config does not have are absent."""
    names = _ATTRIBUTES + _LEFT_BEHIND
    return {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}


def set_config(model: nn.Module, own: list[Any], values: dict[str, Any], whole: bool = False) -> None:
    """Writes the attributes into every config that describes the rotary modules, so that whichever is saved is right.

    Args:
        model (`nn.Module`): The model.
        own (`list`): The configs that its rotary modules were built from.
        values (`dict[str, Any]`): The attributes.
        whole (`bool`): Whether they are all that `config_state` gave; the rest is taken away then.
    """
    configs = {id(config): config for config in own}
    parameters = str(rope_parameters_of(own[0]))
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


def keep_older_keys(config: Any) -> None:
    """Puts the keys of Transformers 4 into a config that was written for it, as its `rope_parameters` now are.

    Settings that Transformers 4 cannot compute go without: such a model has to be exported again to be read there.
    """
    if getattr(config, EXPORT_KEY, None) != V4:
        return
    # `rope_scaling` is a property of config classes, so this does not shadow it; it is what is saved.
    stated = vars(config)
    for key in OLDER_KEYS:
        stated.pop(key, None)
    parameters, family = getattr(config, "rope_parameters", None) or {}, config.model_type
    if is_guarded(config):
        return  # Transformers 4 would load it without the patch
    main = parameters[FULL] if in_older_form(parameters, family) else parameters
    if not main.get("rope_theta") or not read_by_v4(main, family, config.max_position_embeddings):
        return
    if hasattr(config, RECORD_KEY) and is_reworded(main, family):
        return
    stated.update(copy.deepcopy(older_keys(parameters, family)))


def config_values(config: Any) -> dict[str, Any]:
    """What a config holds, for making another config of it: without the record of a patch and what
    `keep_older_keys` put there.
    """
    values = config.to_dict()
    left_out = {RECORD_KEY, *(OLDER_KEYS if values.get(EXPORT_KEY) == V4 else ())}
    return {key: value for key, value in values.items() if key not in left_out}
