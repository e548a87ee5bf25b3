"""Building a model from its config without memory for its weights, and with its rotary modules as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
