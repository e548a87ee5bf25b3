"""What supported versions of Transformers spell differently, and the names of its that no documentation promises.

`tests/hf/test_canary.py` has a test for each: a release that moves one of them fails there first.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.masking_utils import and_masks as and_masks
from transformers.masking_utils import sdpa_mask as sdpa_mask


# Caches.

_CACHE_NAMES = ("cache", "past_key_values")
"""Of the argument that holds a model's cache: from Transformers 5.24 on, and before."""
CACHE_NAME = next(name for name in _CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""In this Transformers; outputs have it under the same name."""


def cache_argument(model: Any) -> str:
    """What the forward call of a model calls its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), CACHE_NAME)


def take_cache(model: Any, arguments: dict[str, Any]) -> Any:
    """The cache among keyword arguments of a forward call, which gets it under the name that the model takes."""
    name = cache_argument(model)
    for other in _CACHE_NAMES:
        if other != name and (given := arguments.pop(other, None)) is not None:
            arguments[name] = given if arguments.get(name) is None else arguments[name]
    return arguments.get(name)


def caches_of(model: Any, args: tuple[Any, ...], arguments: dict[str, Any], output: Any = None) -> list[Any]:
    """The caches in a forward call, under whatever names, and in its output; none that is not made of layers."""
    if args:
        arguments = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | arguments
    values = [arguments.get(name) for name in _CACHE_NAMES]
    if isinstance(output, dict):
        values += [output.get(name) for name in _CACHE_NAMES]
    elif isinstance(output, tuple):
        values += output
    caches = {id(value): value for value in values if isinstance(value, Cache) and hasattr(value, "layers")}
    return list(caches.values())


# Compilers.


def is_exporting() -> bool:
    """Whether `torch.export` is at work. Under `torch.compile`, torch 2.11 takes its own function for true."""
    return torch.compiler._is_exporting_flag


# Attention.


def attention_implementation(config: Any) -> str | None:
    """The name of the attention that a config states; `None` if it states none."""
    return getattr(config, "_attn_implementation", None)


def is_registered_attention(name: str | None) -> bool:
    """Whether an attention function was registered under a name; those that Transformers names itself are not."""
    return name in AttentionInterface._global_mapping


def has_mask_function(name: str | None) -> bool:
    """Whether a mask function is known under the name of an attention."""
    return name in ALL_MASK_ATTENTION_FUNCTIONS


def scale_softmax(decoder: nn.Module, layer_type: str | None, rope_parameters: dict[str, Any]) -> None:
    """Gives latent attention the multiplier of scores that its own code computes from RoPE parameters when it is built
    (the part of YaRN that DeepSeek keeps in its softmax, `mscale_all_dim`).

    Only attention whose code does so is touched. Transformers computes it once, so a live model whose parameters
    change would keep the multiplier of the old ones, and a reloaded one would not.
    """
    for module in decoder.modules():
        compute = getattr(sys.modules.get(type(module).__module__), "yarn_apply_mscale", None)
        known: Any = module
        if compute is not None and layer_type is None and isinstance(getattr(known, "scaling", None), float):
            known.scaling = compute(rope_parameters, known.qk_head_dim**-0.5)


# Configs.


def rope_functions() -> Mapping[str, Callable[..., Any]]:
    """Functions from a config to frequencies and attention factor, by `rope_type`; `default` is not among them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS


def ignored_rope_keys(config: Any) -> set[str]:
    """Keys of `rope_parameters` that a config class reads without checking them, such as sections."""
    return set(getattr(config, "ignore_keys_at_rope_validation", None) or ())


def layers_differ(config: Any) -> bool:
    """Whether layers differ in heads or windows, so that each has a config of its own."""
    return bool(getattr(config, "is_heterogeneous", False))


def layer_configs(config: Any) -> list[Any]:
    """One config per layer: the same one, unless layers differ."""
    if layers_differ(config):
        return list(config.per_layer_config)
    return [config] * getattr(config, "num_hidden_layers", 1)


def layer_type_config(config: Any, layer_type: str | None) -> Any:
    """The config of the layers of one type, where the heads of layer types differ in number or width."""
    if layer_type and layers_differ(config):
        try:
            return config.per_layer_config[layer_type]
        except ValueError:
            pass  # layers of one type differ, in something else than their heads
    return config


# Checkpoints.

_AUTO_CLASSES = (
    *("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    *("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"),
)
"""Where to look, in this order, for the class of a model whose config names none."""


def auto_model_classes(config: Any) -> Iterator[Any]:
    """The classes that the auto classes have for a config."""
    import transformers

    for name in _AUTO_CLASSES:
        known = getattr(transformers, name)._model_mapping.get(type(config), ())
        yield from known if isinstance(known, (list, tuple)) else [known]


def build_model(cls: Any, config: Any) -> Any:
    """A model of a class, with arbitrary weights."""
    return cls._from_config(config)


def optional_file(source: str, name: str) -> str | None:
    """The path of a file of a folder or hub id, fetched if need be; `None` if there is none.

    Raises:
        OSError: the source itself is not accessible.
    """
    from transformers.utils import cached_file

    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
