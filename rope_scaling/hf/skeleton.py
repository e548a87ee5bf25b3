"""The class that a config names, and a model of it without memory for its weights, its rotary modules as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.compat import auto_model_classes, build_model
from rope_scaling.hf.configs import RECORD_KEY, rope_parameters_of, text_config
from rope_scaling.hf.record import check_record
from rope_scaling.hf.rope_types import check_types
from rope_scaling.hf.save_guard import is_guarded


@contextmanager
def without_weights() -> Iterator[None]:
    """Builds parameters on the meta device, those of experts before they are registered too; buffers as usual."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


_LARGE = 2**20
"""Elements from which a tensor is a weight; buffers of that size are not needed either."""


class _LargeOnMeta(TorchFunctionMode):
    """Gives weights no memory already when they are made: the experts of one layer of DeepSeek-V3 take 30 GB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if math.prod(size) > _LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_skeleton(name: str, config: Any) -> torch.nn.Module:
    """The model that a config describes, without weights, and unpatched even if the config records a patch.

    Raises:
        RopeScalingError: Transformers has no class for it, or does not compute its type of scaling.
        Exception: whatever the class raises for a config that it cannot take.
    """
    config = buildable(config)
    with without_weights(), unknown_types_named(config):
        return build_model(class_of(name, config), config)


def class_of(name: str, config: Any) -> Any:
    """The class that a config names, or else the first that the auto classes have for it."""
    import transformers

    for architecture in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, architecture, None)
        if cls is not None and type(config) is getattr(cls, "config_class", None):
            return cls
    for cls in auto_model_classes(config):
        if type(config) is (cls.config_class or type(config)):
            return cls
    raise RopeScalingError(
        f"Transformers {transformers.__version__} has no model for the config of {name!r} (`model_type` "
        f"{getattr(config, 'model_type', None)!r}). Load the model with its own code and give it to "
        "`rope_scaling.patch`."
    )


def buildable(config: Any) -> Any:
    """A config that a model can be built from: without what makes plain Transformers refuse it, if there is any."""
    text = text_config(config)
    record = getattr(text, RECORD_KEY, None)
    if record is not None and is_guarded(text):
        for key, value in check_record(record)["pretrained"].items():
            setattr(text, key, copy.deepcopy(value))
    return config


@contextmanager
def unknown_types_named(config: Any) -> Iterator[None]:
    """Names the type of scaling if building a model fails because Transformers does not compute it."""
    try:
        yield
    except (KeyError, TypeError):
        check_types(rope_parameters_of(text_config(config)))
        raise
