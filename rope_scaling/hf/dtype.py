"""The dtype that a model computes in: the checkpoint's, unless this processor is slow in it."""

from __future__ import annotations

import logging
import platform
from functools import cache
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.configs import text_config


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_logger = logging.getLogger("rope_scaling")


def compute_dtype(name: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """What `from_pretrained` takes as `dtype`.

    Args:
        name (`str`): `float32`, `bfloat16`, `float16`; `stored` for the checkpoint's own, or `auto` for the same,
            or float32 on a processor that is slow in it, which is logged once.
        stored (`torch.dtype`, *optional*): The checkpoint's own, where it is known.
        device (`torch.device`): Where the model computes.

    Raises:
        RopeScalingError: `name` is not one of these.
    """
    if name not in ("auto", "stored"):
        if name not in _DTYPES:
            raise RopeScalingError(f"`dtype` must be one of auto, {', '.join(_DTYPES)}; got {name!r}.")
        return _DTYPES[name]
    if name == "stored" or stored is None or device.type != "cpu" or is_fast(stored):
        return "auto"
    _say_once(str(stored).removeprefix("torch."))
    return torch.float32


def stored_dtype(config: Any) -> torch.dtype | None:
    """The dtype of a checkpoint's weights, as its config states it; `None` if it does not."""
    return getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)


def is_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices in a dtype no slower than in float32.

    Without instructions for bfloat16 or float16, products take 3 (AVX-512) to 40 (AVX2) times as long. Read from the
    processor, and from `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA`; a timed product would depend on what else runs.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # with AVX-512 alone, which computes it by way of float32
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return supported
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return supported and wide and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def _say_once(dtype: str) -> None:
    _logger.warning(
        "rope-scaling: the checkpoint is in %s, which this processor is slow in, so it is loaded in float32. "
        "`dtype=%s` keeps it.",
        dtype,
        dtype,
    )
