"""Making sure that a checkpoint whose attention was changed never loads as a model without the change."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.pretrained import config_with
from rope_scaling.hf.record import ACTIVATION_KEYS
from rope_scaling.hf.rotary import Slot


MESSAGE = "rope_scaling: this model's attention was patched; load it with rope_scaling.from_pretrained(folder)"
"""What stands in the config where Transformers, and every server that reads its configs, looks a name up and fails."""


def fail_in_plain_transformers(
    slots: list[Slot], parameters: dict[str, Any], max_position_embeddings: int | None
) -> dict[str, Any]:
    """Config attributes that no plain loader accepts, and whose error is `MESSAGE`.

    The name of the RoPE type carries the message. Configs that check this name against a list of their own (Phi-3)
    could not be saved with it, and families that compute their angles from no config never read it; there the name of
    the activation function does.

    Raises:
        RopeScalingError: the config states no activation function either.
    """
    loud = copy.deepcopy(parameters)
    for slot in slots:
        # Attention of DeepSeek's kin, up to Transformers 5.23, asks for the factor of every type before its name.
        loud = slot.with_part(loud, {"factor": 1.0, **slot.part_of(loud), "rope_type": MESSAGE})
    if slots[0].in_config and _taken(slots[0], loud, max_position_embeddings):
        return {"rope_parameters": loud}
    config = slots[0].config
    activation = {name: MESSAGE for name in ACTIVATION_KEYS if hasattr(config, name)}
    if not activation:
        raise RopeScalingError(
            f"A patched model of {type(config).__name__} could not be saved so that plain Transformers refuses it: it "
            f"takes no other `rope_type` and has none of {', '.join(ACTIVATION_KEYS)}. The model was left as it was."
        )
    return {"rope_parameters": parameters, **activation}


def _taken(slot: Slot, parameters: dict[str, Any], max_position_embeddings: int | None) -> bool:
    try:
        with unwarned():
            config_with(slot, parameters, max_position_embeddings)
    except Exception:  # whatever the config class raises for a type that it does not take
        return False
    return True


@contextmanager
def unwarned() -> Iterator[None]:
    """Without Transformers' warning of every RoPE type that it has no check for."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_loud(config: Any) -> bool:
    """Whether plain Transformers would refuse this config."""
    return MESSAGE in [str(getattr(config, name, "")) for name in ACTIVATION_KEYS] or MESSAGE in str(
        getattr(config, "rope_parameters", "")
    )
