"""Makes RoPE language models of Transformers read beyond their trained length, and measures how far they do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import (
    METHODS,
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
    make_method,
)
from rope_scaling.geometry import RopeGeometry, default_inv_freq


if TYPE_CHECKING:
    from rope_scaling.hf.describe import describe
    from rope_scaling.hf.patch import patch, patched, unpatch


from rope_scaling.version import __version__ as __version__


# What needs Transformers is found when it is first used, so that importing the library costs no more than importing
# torch.
_LAZY = {
    "describe": "rope_scaling.hf.describe",
    "patch": "rope_scaling.hf.patch",
    "patched": "rope_scaling.hf.patch",
    "unpatch": "rope_scaling.hf.patch",
}

__all__ = [
    "METHODS",
    "Abf",
    "ClippedFrequency",
    "DroPe",
    "FrequencyMethod",
    "Linear",
    "Llama3",
    "LongRope",
    "MrRopePro",
    "MrRopeUni",
    "Ntk",
    "NtkByParts",
    "NtkMixed",
    "PRope",
    "Power",
    "Resonance",
    "RopeGeometry",
    "RopeScalingError",
    "Truncated",
    "Yarn",
    "default_inv_freq",
    "describe",
    "make_method",
    "patch",
    "patched",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
