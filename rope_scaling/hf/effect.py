"""Whether a model can feel a patch: which of its layers rotate queries and keys, and how far those see."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.compat import layer_configs
from rope_scaling.hf.configs import windows_of
from rope_scaling.hf.layer_spans import level_of_the_caller
from rope_scaling.hf.layout_detection import rotating_layers
from rope_scaling.hf.slot import Slot, SlotKey


def check_effect(checkpoint: Checkpoint, patched: Collection[SlotKey], length: int) -> None:
    """Looks, by running the decoders on a few vectors, whether a patch of their rotary modules changes anything.

    Args:
        checkpoint (`Checkpoint`): The model, before the patch.
        patched (collection of `SlotKey`): Those of its slots that are to be patched.
        length (`int`): Tokens that it is to read.

    Raises:
        RopeScalingError: no layer rotates queries and keys, so no logit can change.

    Warns:
        UserWarning: layers that see the whole text do not rotate, and those that do see less than `length` tokens.
    """
    for path in sorted({slot.decoder for slot in checkpoint.slots if slot.key in patched}):
        slots = [slot for slot in checkpoint.slots if slot.decoder == path]
        decoder: Any = checkpoint.model.get_submodule(path)
        seen = rotating_layers(decoder)
        if seen is None:
            continue
        rotating, used = seen
        if not any(rotating):
            if all(map(_is_zero, slots)):
                continue  # a model under `drope`: what its layers would rotate by cannot be seen
            raise RopeScalingError(
                f"No layer of {type(decoder).__name__} rotates queries and keys, although it has a rotary module (a "
                "model with ALiBi, for one): a patch could not change any logit. Extend it by what its attention uses."
            )
        limits = _limits(decoder.config, used)
        own = {slot.layer_type for slot in slots if slot.key in patched}
        types = getattr(decoder.config, "layer_types", None) or [None] * len(rotating)
        scaled = [rotates and (own == {None} or kind in own) for rotates, kind in zip(rotating, types, strict=True)]
        far = [limit is None or limit >= length for limit in limits]
        attends = [kind is None or ("attention" in kind and "linear" not in kind) for kind in types]
        if (
            any(scaled)
            and not any(map(all, zip(scaled, far, strict=True)))
            and any(map(all, zip(attends, far, strict=True)))
        ):
            widest = max(limit for limit, rotates in zip(limits, scaled, strict=True) if rotates and limit is not None)
            warnings.warn(
                f"The layers of {type(decoder).__name__} that see the whole text have no rotary embedding, and those "
                f"that have one see {widest} tokens at most, which the model was trained on. A patch to {length} "
                "tokens changes what they compute and helps no layer to see further: the model may read that far "
                "without it.",
                stacklevel=level_of_the_caller(),
            )


def _is_zero(slot: Slot) -> bool:
    """Whether all frequencies of a rotary module are zero, or as near to it as a config can say."""
    return bool((slot.inv_freq.detach().float().abs() < 1e-30).all())


def warn_of_windows(checkpoint: Checkpoint, length: int) -> None:
    """Warns of a model whose every layer sees less than `length` tokens."""
    window = max((window or length for window in checkpoint.windows), default=length)
    kinds = set(getattr(checkpoint.config, "layer_types", None) or ["sliding_attention"])
    if window < length and kinds == {"sliding_attention"}:
        warnings.warn(
            f"Every layer of this model attends to the last {window} tokens only (`sliding_window`), so no layer sees "
            f"{length} tokens at once, whatever its frequencies.",
            stacklevel=level_of_the_caller(),
        )


def _limits(config: Any, used: set[int]) -> list[int | None]:
    """How many tokens every layer sees at once; `None` for all."""
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    limits: list[int | None] = []
    for kind, layer, window in zip(types, layer_configs(config), windows_of(config), strict=True):
        size = getattr(layer, "attention_chunk_size", None) if kind == "chunked_attention" else window
        windowed = kind is None or "sliding" in kind or "chunked" in kind
        limits.append(size if windowed and size in used else None)
    return limits
