"""The keys under which Transformers 4 reads RoPE settings, kept in a config through every further save.

Transformers 5 takes these keys from a config that it loads, and writes `rope_parameters` alone. A checkpoint written
for Transformers 4 says so in its config, and that note outlives a loading. Where this library sees it, the keys go
back into the config, so that whatever saves the config (the model, a Trainer's checkpoint, a merge) writes both.
"""

from __future__ import annotations

import math
from typing import Any


EXPORT_KEY = "rope_scaling_export"
"""What the config of a checkpoint written for a target says of it."""
V4 = "transformers-v4"
_Types = dict[str, tuple[str, ...] | None]
_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_OTHER_NAMES = {"gpt_neox": _NEOX_NAMES, "gpt_neox_japanese": _NEOX_NAMES}
"""By model type, the names that its config class in Transformers 4 has for base and rotated share. It ignores the
usual ones and takes its defaults."""
_READ_BY_V4: _Types = dict.fromkeys(("default", "linear", "yarn", "llama3", "longrope"))
_TYPES_OF_FAMILIES: dict[str, _Types] = {
    "nemotron": {"default": None},
    "recurrent_gemma": {"default": None},
    "llama4_text": {"default": None, "llama3": None},
    "olmo": {"default": None, "linear": ("factor",)},
    "olmo2": {"default": None, "linear": ("factor",)},
    "chameleon": {"default": None, "linear": ("factor",)},
    "phi3": {"default": None, "longrope": ("short_factor", "long_factor")},
    "phi4_multimodal": {"default": None, "longrope": ("short_factor", "long_factor")},
}
"""By model type, the types that Transformers 4 computes, where these are fewer than usual; and the only keys that its
config class takes beside `type`, where it takes no others."""
FULL, SLIDING = "full_attention", "sliding_attention"
_LOCAL_BASE = "rope_local_base_freq"
_WITH_LOCAL_BASE = ("gemma3_text", "gemma3n_text")
"""Families whose older form has the base of sliding layers under a key of its own, and all else for full attention."""
OLDER_KEYS = ("rope_scaling", "rope_theta", _LOCAL_BASE, *_NEOX_NAMES.values())


def types_read_by_v4(model_type: str) -> tuple[str, ...]:
    """The types that Transformers 4 computes for a family as Transformers 5 does."""
    return tuple(_TYPES_OF_FAMILIES.get(model_type, _READ_BY_V4))


def in_older_form(parameters: dict[str, Any], model_type: str) -> bool:
    """Whether `older_keys` can state settings by layer type: those of full attention, and another base elsewhere."""
    by_type = model_type in _WITH_LOCAL_BASE and parameters.keys() == {FULL, SLIDING}
    return by_type and parameters[SLIDING]["rope_type"] == "default"


def read_by_v4(parameters: dict[str, Any], model_type: str, length: int) -> bool:
    """Whether Transformers 4 computes from `older_keys` what Transformers 5 computes from `parameters`."""
    kind = parameters["rope_type"]
    types = _TYPES_OF_FAMILIES.get(model_type, _READ_BY_V4)
    if kind not in types:
        return False
    taken, stated = types[kind], parameters.get("attention_factor")
    if taken is None or kind != "longrope" or stated is None:
        return True
    # Where the attention factor cannot be stated, it follows from the two lengths.
    original = parameters["original_max_position_embeddings"]
    factor = length / original
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return math.isclose(stated, derived, rel_tol=1e-6)


def older_keys(parameters: dict[str, Any], model_type: str, strict: bool = True) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like, which say what `parameters` (`rope_parameters`) say.

    Args:
        parameters (`dict[str, Any]`): `rope_parameters` of a config.
        model_type (`str`): Its family, which may have names of its own.
        strict (`bool`): Whether `rope_scaling` has only keys that the family's config class in Transformers 4 takes.
    """
    if in_older_form(parameters, model_type):
        local = {_LOCAL_BASE: parameters[SLIDING]["rope_theta"]}
        return older_keys(parameters[FULL], model_type, strict) | local
    kind = parameters["rope_type"]
    flat = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if strict and (taken := _TYPES_OF_FAMILIES.get(model_type, {}).get(kind)):
        flat = {"type": kind, **{key: parameters[key] for key in taken}}
    keys = {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if flat.keys() <= {"rope_type", "partial_rotary_factor"} else flat,
    }
    if "partial_rotary_factor" in parameters:
        keys["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    for name, other in _OTHER_NAMES.get(model_type, {}).items():
        keys[other] = parameters.get(name, 1.0)
    if kind == "longrope":
        # Older readers, and servers, look for the first trained length beside the dict.
        keys["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return keys


def is_reworded(parameters: dict[str, Any], model_type: str) -> bool:
    """Whether Transformers 5 reads other keys from `older_keys` than `parameters`, though they say the same: a record
    of the patch then no longer fits.
    """
    return _TYPES_OF_FAMILIES.get(model_type, {}).get(parameters["rope_type"]) is not None


def stated_in_older_keys(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Base and rotated share at the top of a config, where older readers look, under their names of today."""
    names = {name: name for name in (*_NEOX_NAMES, _LOCAL_BASE)} | _OTHER_NAMES.get(model_type, {})
    stated = {name: values.get(older) for name, older in names.items()}
    return {name: value for name, value in stated.items() if value is not None}
