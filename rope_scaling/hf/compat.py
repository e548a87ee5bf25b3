"""Names that supported versions of Transformers spell differently."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


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
    found = {id(value): value for value in values if isinstance(value, Cache) and hasattr(value, "layers")}
    return list(found.values())


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
