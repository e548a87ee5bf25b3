"""The keys under which Transformers 4 reads RoPE settings, kept in a config through every further save.

Transformers 5 takes these keys from a config that it loads, and writes `rope_parameters` alone. A checkpoint written
for Transformers 4 says so in its config, and that note outlives a loading. Where this library sees it, the keys go
back into the config, so that whatever saves the config (the model, a Trainer's checkpoint, a merge) writes both.
"""

from __future__ import annotations

import copy
from typing import Any


EXPORT_KEY = "rope_scaling_export"
"""What the config of a checkpoint written for a target says of it."""
V4 = "transformers-v4"
READ_BY_V4 = frozenset({"default", "linear", "yarn", "llama3", "longrope"})
"""Types that Transformers 4 computes as Transformers 5 does."""
_KEYS = ("rope_scaling", "rope_theta")


def older_keys(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like, which say what `parameters` (`rope_parameters`) say."""
    flat = {key: value for key, value in parameters.items() if key != "rope_theta"}
    keys = {
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if parameters["rope_type"] == "default" else flat,
    }
    if "partial_rotary_factor" in parameters:
        keys["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if parameters["rope_type"] == "longrope":
        # Older readers, and servers, look for the first trained length beside the dict.
        keys["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    return keys


def keep_older_keys(config: Any) -> None:
    """Puts the older keys into a config that was written for Transformers 4, as its `rope_parameters` now are.

    Settings that Transformers 4 cannot compute go without: it has to be exported anew to travel there.
    """
    if getattr(config, EXPORT_KEY, None) != V4:
        return
    # `rope_scaling` is a property of config classes, so this does not shadow it; it is what is saved.
    stated = vars(config)
    for key in _KEYS:
        stated.pop(key, None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") in READ_BY_V4 and parameters.get("rope_theta"):
        stated.update(copy.deepcopy(older_keys(parameters)))


def without_older_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a config without what was put back, for making another config of them."""
    if values.get(EXPORT_KEY) != V4:
        return values
    return {key: value for key, value in values.items() if key not in _KEYS}
