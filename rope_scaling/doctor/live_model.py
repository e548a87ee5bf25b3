"""What can be wrong with a model in memory, whatever its config states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rope_scaling.doctor.findings import Finding, found
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.compat import attention_implementation, has_mask_function, is_registered_attention
from rope_scaling.hf.configs import rope_parameters_of
from rope_scaling.hf.guard import guard_of
from rope_scaling.hf.model_patch import Patch
from rope_scaling.hf.pretrained_rope import frequencies_from_config
from rope_scaling.hf.slot import Slot, patch_state


_LONG = 8192
"""Tokens from which a whole matrix of scores is worth a word."""


def check_live_model(checkpoint: Checkpoint, patch: Patch | None) -> Iterator[Finding]:
    """Everything that a model in memory shows.

    Args:
        checkpoint (`Checkpoint`): What `read_checkpoint` gave.
        patch (`Patch`, *optional*): The patch in effect on it.
    """
    for slot in checkpoint.slots:
        if not slot.inv_freq.is_meta:
            yield from _frequencies(slot, patch)
    patched = {slot.decoder for slot in checkpoint.slots if patch_state(slot) is not None}
    for path in sorted({slot.decoder for slot in checkpoint.slots}):
        decoder = checkpoint.model.get_submodule(path)
        guard = guard_of(decoder)
        problems = list(guard.problems(decoder, deep=True)) if guard is not None else []
        if guard is None and path in patched:
            problems = [
                f"The forward hooks of `{path or type(checkpoint.model).__name__}` were removed after the patch."
            ]
        for problem in problems:
            yield found(
                "RS405",
                problem,
                "Patch the model again (`rope_scaling.patch(model, ...)`) after the change, or `unpatch` it before.",
            )
    yield from _attention(checkpoint.slots[0].config, bool(patch and patch.programs))


def _frequencies(slot: Slot, patch: Patch | None) -> Iterator[Finding]:
    frequencies = slot.inv_freq.detach().float().cpu()
    if not torch.isfinite(frequencies).all() or bool((frequencies.abs() > 1e6).any()) or not frequencies.any():
        yield found(
            "RS402",
            f"The frequencies in `{slot.path}` are not valid numbers: {frequencies[:3].tolist()}... Something "
            "built the model without filling its buffers.",
            "Load it with `from_pretrained`, which fills them in.",
        )
        return
    if slot.inv_freq.dtype != torch.float32:
        yield found(
            "RS403",
            f"The frequencies in `{slot.path}` were rounded to {slot.inv_freq.dtype}, so angles at long distances are "
            "off by whole rotations.",
            "Load with `dtype=...` in place of `.to(...)` or `.half()`; `patch` brings them back in float32.",
        )
        return
    wanted = _wanted(slot, patch)
    if wanted is not None and not (
        wanted.shape == frequencies.shape and torch.allclose(frequencies, wanted, rtol=1e-5, atol=1e-12)
    ):
        kind = slot.part_of(rope_parameters_of(slot.config))["rope_type"]
        yield found(
            "RS401",
            f"`{slot.path}` rotates with other frequencies than the config states ({kind!r}). Transformers computes "
            "them when it builds a model; a config that is edited later changes nothing.",
            "Load the model again and patch it: `rope_scaling.patch(model, ...)` changes both and verifies it.",
        )


def _wanted(slot: Slot, patch: Patch | None) -> Any:
    if patch_state(slot) is not None and patch is not None:
        change = patch.slots.get(slot.key)
        return None if change is None else change.inv_freq
    try:
        return frequencies_from_config(slot, slot.config)[0]
    except (RopeScalingError, KeyError, TypeError, ValueError):
        return None  # the settings themselves cannot be computed, which is found elsewhere


def _attention(config: Any, ours: bool) -> Iterator[Finding]:
    name = attention_implementation(config)
    if is_registered_attention(name) and not has_mask_function(name):
        yield found(
            "RS404",
            f"The attention function {name!r} is registered without a mask function of the same name, so Transformers "
            "makes no mask: padding is attended to.",
            f"Register one: `AttentionMaskInterface.register({name!r}, sdpa_mask)`, or what fits the function.",
        )
    length = getattr(config, "max_position_embeddings", None)
    if name == "eager" and not ours and isinstance(length, int) and length >= _LONG:
        heads = getattr(config, "num_attention_heads", 1)
        gigabytes = heads * length**2 * 4 / 2**30
        yield found(
            "RS406",
            f"Eager attention keeps every score: {gigabytes:,.0f} GB a layer for a text of {length} tokens, float32.",
            "`model.set_attn_implementation('sdpa')`, or flash attention.",
        )
