"""The part of YaRN that multi-head latent attention keeps in its softmax: DeepSeek's `mscale_all_dim`."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from rope_scaling.hf.rotary import Slot


def scale_softmax(model: nn.Module, slot: Slot, rope_parameters: dict[str, Any]) -> None:
    """Gives attention the multiplier of scores that its own code computes from RoPE parameters when it is built.

    Only attention whose code does so is touched. Transformers computes it once, so a live model whose parameters
    change would keep the multiplier of the old ones, and a reloaded one would not.
    """
    for module in model.get_submodule(slot.decoder).modules():
        compute = getattr(sys.modules.get(type(module).__module__), "yarn_apply_mscale", None)
        known: Any = module
        if compute is not None and slot.layer_type is None and isinstance(getattr(known, "scaling", None), float):
            known.scaling = compute(rope_parameters, known.qk_head_dim**-0.5)
