"""Reference models of preference tuning, which TRL's trainers load again by the policy's name.

Such a model comes without the policy's patch, and nobody sees the load: the losses would compare two different models.
While a trainer of TRL whose model is patched builds another one, PyTorch tells of every submodule that is registered,
so the reference model can be given the same patch before its first forward call.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from rope_scaling.errors import RopeScalingError


_watching = False


def watch_trainers() -> None:
    """From now on gives reference models that TRL's trainers load the patch of their policy."""
    global _watching
    if not _watching:
        torch.nn.modules.module.register_module_module_registration_hook(_registered)
        _watching = True


def _registered(module: nn.Module, name: str, submodule: Any) -> None:
    if (
        "trl" not in sys.modules
        or not isinstance(module, PreTrainedModel)
        or not isinstance(submodule, PreTrainedModel)
    ):
        return
    if (trainer := _loading_trainer()) is None or hasattr(module, "_rope_scaling_reference"):
        return
    from rope_scaling.hf.patch import patch_record

    try:
        record = patch_record(trainer.model)
    except RopeScalingError:  # a model without RoPE, or one that is not built yet
        return
    if record is not None:
        object.__setattr__(module, "_rope_scaling_reference", True)
        handle: list[Any] = []
        hook = partial(_patch_first, handle, record, type(trainer).__name__)
        handle.append(module.register_forward_pre_hook(hook))


def _loading_trainer() -> Any:
    """The trainer of TRL that is loading a model, if this call comes from one that has its own already."""
    frame: Any = sys._getframe(1)
    loading = False
    while frame is not None:
        loading = loading or frame.f_code.co_name == "create_model_from_path"
        caller = frame.f_locals.get("self") if loading else None
        if isinstance(caller, Trainer) and isinstance(getattr(caller, "model", None), nn.Module):
            return caller
        frame = frame.f_back
    return None


def _patch_first(handle: list[Any], record: dict[str, Any], trainer: str, model: Any, args: Any) -> None:
    from rope_scaling.hf.patch import patch_as_recorded

    handle.pop().remove()
    names = " + ".join(method["name"] for method in record["methods"])
    warnings.warn(
        f"{trainer} loaded its reference model by name, without the patch of the model it trains. It gets the same "
        f"patch now ({names}). To choose it yourself, pass `ref_model`.",
        stacklevel=2,
    )
    patch_as_recorded(model, record)
