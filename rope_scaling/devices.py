"""Constants on several devices."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def constant_on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that never changes, on a device; copied there once."""
    if tensor.device == device:
        return tensor
    copies = _COPIES.setdefault(tensor, {})
    if device not in copies:
        copies[device] = tensor.to(device)
    return copies[device]  # type: ignore[no-any-return]
