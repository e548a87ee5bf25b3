"""Building a model from its config without memory for its weights, and with its rotary modules as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_weights() -> Iterator[None]:
    """Builds parameters on the meta device, those of experts before they are registered too; buffers as usual."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _EmptyOnMeta():
        yield


class _EmptyOnMeta(TorchFunctionMode):
    """Gives `torch.empty`, from which every weight is made, no memory: 30 GB a layer in the experts of DeepSeek-V3."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
