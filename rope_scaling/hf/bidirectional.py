"""Windows for attention that is not causal: stock attention, with the model's own masks narrowed on both sides."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.compat import and_masks, sdpa_attention_forward, sdpa_mask
from rope_scaling.spans import SlidingWindow, SpanMethod


def bidirectional_error(name: str) -> RopeScalingError:
    """The error for attention that is not causal."""
    return RopeScalingError(
        f"{name} uses bidirectional attention; span methods and temperatures require causal attention. Frequency "
        "methods work on it, and `sliding_window` without sinks."
    )


class WindowProgram:
    """A window of an encoder: every token sees those less than `window` tokens away, before it and after it."""

    reach = None

    def __init__(self, methods: tuple[SpanMethod, ...], window: int):
        self.methods, self.window = methods, window

    def register(self) -> str:
        """Makes the window known to Transformers, in this process, and returns its name."""
        name = f"rope_scaling_within_{self.window}"
        AttentionInterface.register(name, sdpa_attention_forward)
        AttentionMaskInterface.register(name, _Narrowed(self.window))
        return name


class _Narrowed:
    """The mask function of PyTorch's attention, with a window laid over whatever the model asks for."""

    def __init__(self, window: int):
        self.window = window

    def __call__(self, *args: Any, mask_function: Any, **kwargs: Any) -> torch.Tensor | None:
        narrowed = and_masks(mask_function, self._near)
        return sdpa_mask(*args, **{**kwargs, "mask_function": narrowed, "allow_is_bidirectional_skip": False})

    def _near(self, row: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key).abs() < self.window


def window_program(decoder: Any, methods: tuple[SpanMethod, ...], temperature: Any, reach: int) -> WindowProgram:
    """What attention that is not causal can do of a patch.

    Raises:
        RopeScalingError: it is anything but one window without sinks.
    """
    only = methods[0] if len(methods) == 1 and temperature is None else None
    if not isinstance(only, SlidingWindow) or only.num_sinks:
        raise bidirectional_error(type(decoder).__name__)
    return WindowProgram(methods, only.window or reach)
