"""Makes RoPE language models of Transformers read beyond their trained length, and measures how far they do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import (
    Abf,
    ClippedFrequency,
    DroPe,
    FrequencyMethod,
    Linear,
    Llama3,
    LongRope,
    MrRopePro,
    MrRopeUni,
    Ntk,
    NtkByParts,
    NtkMixed,
    Power,
    PRope,
    Resonance,
    Truncated,
    Yarn,
)
from rope_scaling.geometry import RopeGeometry, default_inv_freq
from rope_scaling.methods import METHODS, make_method
from rope_scaling.relative import relative_positions
from rope_scaling.spans import (
    Alternating,
    AngleClip,
    DualChunk,
    DynamicLinear,
    DynamicLongRope,
    DynamicNtk,
    DynamicYarn,
    LeakyReRope,
    LmInfinite,
    ReRope,
    Rope,
    SelfExtend,
    SlidingWindow,
    Span,
    SpanMethod,
    Streaming,
    String,
    WavePrune,
)
from rope_scaling.temperatures import Constant, Llama4, LogN, Temperature


if TYPE_CHECKING:
    from rope_scaling.doctor import diagnose
    from rope_scaling.exporters.checkpoints import config_overrides, export
    from rope_scaling.hf.adapters import load_adapter, record_adapter
    from rope_scaling.hf.chunked_loss import remove_chunked_loss, use_chunked_loss
    from rope_scaling.hf.describe import describe, read_description
    from rope_scaling.hf.loading import from_pretrained, load_model, load_tokenizer
    from rope_scaling.hf.patch import patch, patched, unpatch
    from rope_scaling.hf.s2 import remove_s2_attention, use_s2_attention


from rope_scaling.version import __version__ as __version__


# What needs Transformers is found when it is first used, so that importing the library costs no more than importing
# torch.
_LAZY = {
    "config_overrides": "rope_scaling.exporters.checkpoints",
    "describe": "rope_scaling.hf.describe",
    "diagnose": "rope_scaling.doctor",
    "export": "rope_scaling.exporters.checkpoints",
    "from_pretrained": "rope_scaling.hf.loading",
    "load_adapter": "rope_scaling.hf.adapters",
    "load_model": "rope_scaling.hf.loading",
    "load_tokenizer": "rope_scaling.hf.loading",
    "patch": "rope_scaling.hf.patch",
    "patched": "rope_scaling.hf.patch",
    "read_description": "rope_scaling.hf.describe",
    "record_adapter": "rope_scaling.hf.adapters",
    "remove_chunked_loss": "rope_scaling.hf.chunked_loss",
    "remove_s2_attention": "rope_scaling.hf.s2",
    "unpatch": "rope_scaling.hf.patch",
    "use_chunked_loss": "rope_scaling.hf.chunked_loss",
    "use_s2_attention": "rope_scaling.hf.s2",
}

__all__ = [
    "METHODS",
    "Abf",
    "Alternating",
    "AngleClip",
    "ClippedFrequency",
    "Constant",
    "DroPe",
    "DualChunk",
    "DynamicLinear",
    "DynamicLongRope",
    "DynamicNtk",
    "DynamicYarn",
    "FrequencyMethod",
    "LeakyReRope",
    "Linear",
    "Llama3",
    "Llama4",
    "LmInfinite",
    "LogN",
    "LongRope",
    "MrRopePro",
    "MrRopeUni",
    "Ntk",
    "NtkByParts",
    "NtkMixed",
    "PRope",
    "Power",
    "ReRope",
    "Resonance",
    "Rope",
    "RopeGeometry",
    "RopeScalingError",
    "SelfExtend",
    "SlidingWindow",
    "Span",
    "SpanMethod",
    "Streaming",
    "String",
    "Temperature",
    "Truncated",
    "WavePrune",
    "Yarn",
    "config_overrides",
    "default_inv_freq",
    "describe",
    "diagnose",
    "export",
    "from_pretrained",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "make_method",
    "patch",
    "patched",
    "read_description",
    "record_adapter",
    "relative_positions",
    "remove_chunked_loss",
    "remove_s2_attention",
    "unpatch",
    "use_chunked_loss",
    "use_s2_attention",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
