"""Making sure that a checkpoint whose attention was changed never loads as a model without the change."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.record import ACTIVATION_KEYS


MESSAGE = "rope_scaling: this model's attention was patched; load it with rope_scaling.from_pretrained(folder)"
"""Deliberately invalid `rope_type`. Loaders that do not know this library fail on it and show this text."""


class SavedAsMessage(str):
    """A name in a live config: the real one for whatever reads it in this process, and `MESSAGE` in a saved file.

    JSON encoders write the characters that a string holds; comparing, hashing and printing go by the real name.
    """

    real: str

    def __new__(cls, real: str) -> SavedAsMessage:
        self = super().__new__(cls, MESSAGE)
        self.real = real
        return self

    def __eq__(self, other: object) -> bool:
        return self.real == (other.real if isinstance(other, SavedAsMessage) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.real)

    def __contains__(self, part: object) -> bool:
        return part in self.real  # type: ignore[operator]

    def __str__(self) -> str:
        return self.real

    def __repr__(self) -> str:
        return repr(self.real)

    def __format__(self, spec: str) -> str:
        return format(self.real, spec)

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.real,)


def fail_in_plain_transformers(checkpoint: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """Config attributes that no plain loader accepts when they come from a file, and whose error is `MESSAGE`.

    The name of the RoPE type carries the message. Configs that check this name against a list of their own (Phi-3)
    could not be saved with it, and families that compute their angles from no config never read it; there the name of
    the activation function does.

    Args:
        checkpoint (`Checkpoint`): The model as its checkpoint defines it.
        parameters (`dict[str, Any]`): `rope_parameters` that the patched model has.

    Raises:
        RopeScalingError: the config states no activation function either.
    """
    live, saved = copy.deepcopy(parameters), copy.deepcopy(parameters)
    for slot in checkpoint.slots:
        # Attention of DeepSeek's kin, up to Transformers 5.23, asks for the factor of every type before its name.
        part = {"factor": 1.0, **slot.part_of(parameters)}
        saved = slot.with_part(saved, {**part, "rope_type": MESSAGE})
        live = slot.with_part(live, {**part, "rope_type": SavedAsMessage(part.get("rope_type", "default"))})
    if checkpoint.in_config and _is_valid(checkpoint, saved):
        return {"rope_parameters": live}
    config = checkpoint.config
    activation = {
        name: SavedAsMessage(str(getattr(config, name))) for name in ACTIVATION_KEYS if hasattr(config, name)
    }
    if not activation:
        raise RopeScalingError(
            f"A patched model of {type(config).__name__} could not be saved so that plain Transformers refuses it: it "
            f"takes no other `rope_type` and has none of {', '.join(ACTIVATION_KEYS)}. The model is unchanged."
        )
    return {"rope_parameters": parameters, **activation}


def _is_valid(checkpoint: Any, parameters: dict[str, Any]) -> bool:
    """Whether the config class of a checkpoint takes these RoPE parameters."""
    try:
        with unwarned():
            checkpoint.loaded(checkpoint.config).with_settings(
                parameters, checkpoint.settings["max_position_embeddings"]
            )
    except Exception:  # whatever the config class raises for a type that it does not take
        return False
    return True


@contextmanager
def unwarned() -> Iterator[None]:
    """Without Transformers' warning of every RoPE type that it has no check for; in this thread only."""
    logger, thread = logging.getLogger("transformers.modeling_rope_utils"), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def is_guarded(config: Any) -> bool:
    """Whether plain Transformers would refuse this config, read from a file or once it is saved."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    names = [getattr(config, name, None) for name in ACTIVATION_KEYS] + [part.get("rope_type") for part in parts]
    return any(isinstance(name, SavedAsMessage) or name == MESSAGE for name in names)
