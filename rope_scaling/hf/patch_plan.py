"""From a checkpoint and the arguments of `patch` to a `Patch`; nothing is changed yet."""

from __future__ import annotations

import copy
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.decoder_spans import make_programs
from rope_scaling.hf.effect import check_effect, warn_of_windows
from rope_scaling.hf.model_patch import Patch, SlotPatch
from rope_scaling.hf.patch_arguments import PatchArguments, PatchMethods
from rope_scaling.hf.pretrained_rope import PretrainedRope, frequencies_from_config
from rope_scaling.hf.record import ACTIVATION_KEYS, make_record
from rope_scaling.hf.rescaling import matches, rescale, target_length
from rope_scaling.hf.s2 import has_s2_attention
from rope_scaling.hf.save_guard import fail_in_plain_transformers
from rope_scaling.hf.slot import Slot, patch_state
from rope_scaling.methods import factor_of


def plan_patch(checkpoint: Checkpoint, arguments: PatchArguments) -> Patch:
    """Works out everything that a patch changes: frequencies, spans of every layer, the config, the record.

    Args:
        checkpoint (`Checkpoint`): What `read_checkpoint` gave.
        arguments (`PatchArguments`): What `PatchArguments.parse` gave.

    Raises:
        RopeScalingError: arguments that this model does not take, a method that it cannot compute or that no config
            can express, attention that cannot be patched, or a patch that would change nothing.

    Warns:
        UserWarning: windows that keep every layer from seeing the target length.
    """
    if arguments.original_max_position_embeddings is not None:
        checkpoint = checkpoint.trained_at(arguments.original_max_position_embeddings)
    settings = checkpoint.settings
    chosen = arguments.choose(checkpoint.slots)
    methods = arguments.methods_for(max(checkpoint.rope(slot).reach for slot in chosen))
    changes = {slot.key: _plan_slot(checkpoint, slot, methods) for slot in chosen}
    target = max(change.target_length for change in changes.values())
    guarded = methods.in_attention or not checkpoint.in_config
    stated = _stated(checkpoint, changes, guarded)
    if arguments.recorded:
        _check_config_as_recorded(checkpoint, stated["rope_parameters"], guarded)
    programs = {}
    if methods.in_attention:
        _check_no_s2_attention(checkpoint)
        programs = make_programs(checkpoint, changes, methods)
    check_effect(checkpoint, set(changes), target)
    if not methods.spans:
        warn_of_windows(checkpoint, target)
    record = make_record(
        methods.all,
        methods.target_length if methods.in_attention else target,
        sorted({slot.layer_type for slot in chosen if slot.layer_type}) or None,
        checkpoint.original_max_position_embeddings,
        {name: getattr(checkpoint.config, name) for name in ACTIVATION_KEYS if name in stated} | settings,
    )
    values = {**stated, "max_position_embeddings": target, RECORD_KEY: copy.deepcopy(record)}
    return Patch(changes, methods.all, values, programs)


def _plan_slot(checkpoint: Checkpoint, slot: Slot, methods: PatchMethods) -> SlotPatch:
    pretrained = checkpoint.rope(slot)
    _check_as_configured(checkpoint, slot, pretrained)
    if methods.frequency is None:
        if methods.target_length is None and slot.ends_at(pretrained.reach):
            raise RopeScalingError(
                f"{type(slot.module).__name__} uses a precomputed table of {pretrained.reach} positions. Pass "
                f"`target_length={2 * pretrained.reach}` to extend it."
            )
        longest = max(methods.target_length or 0, pretrained.reach)
        return SlotPatch(pretrained, longest, None, pretrained.reach)
    target = target_length(pretrained, methods.frequency, methods.target_length)
    rescaling = rescale(checkpoint, slot, methods.frequency, target)
    same = torch.equal(rescaling.inv_freq, pretrained.inv_freq)
    if same and rescaling.attention_factor == pretrained.attention_factor:
        raise RopeScalingError(f"{methods.frequency} changes nothing on this model: every frequency stays as it is.")
    return SlotPatch(pretrained, target, rescaling, int(pretrained.reach * factor_of(methods.frequency)))


def _stated(checkpoint: Checkpoint, changes: dict[Any, SlotPatch], guarded: bool) -> dict[str, Any]:
    """The attributes of the config that state the frequencies; `guarded`, so that plain loaders refuse it."""
    parameters = copy.deepcopy(checkpoint.settings["rope_parameters"])
    for slot in checkpoint.slots:
        if slot.key in changes and (rescaling := changes[slot.key].rescaling) is not None:
            parameters = slot.with_part(parameters, rescaling.rope_parameters)
    if guarded:
        return fail_in_plain_transformers(checkpoint, parameters)
    return {"rope_parameters": parameters}


def _check_config_as_recorded(checkpoint: Checkpoint, parameters: dict[str, Any], guarded: bool) -> None:
    """Refuses a config whose settings are not those of the patch that it records. A guarded one may have those before
    the patch: it had to be taken back to them to be loaded.
    """
    allowed = [parameters] + ([checkpoint.settings["rope_parameters"]] if guarded else [])
    if checkpoint.config.rope_parameters not in allowed:
        raise RopeScalingError(
            "The config's `rope_parameters` are not those of the patch it records: one of the two was edited. "
            "Name the method you want, as in `patch(model, 'yarn', factor=4)`; it starts from the pretrained state."
        )


def _check_no_s2_attention(checkpoint: Checkpoint) -> None:
    if any(has_s2_attention(checkpoint.model.get_submodule(slot.decoder)) for slot in checkpoint.slots):
        raise RopeScalingError(
            "This model has S2 attention, which cannot be combined with a span method or a temperature: both decide "
            "what attention computes. Call `remove_s2_attention(model)` first, or patch with a frequency method."
        )


def _check_as_configured(checkpoint: Checkpoint, slot: Slot, pretrained: PretrainedRope) -> None:
    """Refuses a module whose frequencies are not those of its config: something else has changed one of them."""
    if pretrained.method is None and not matches(pretrained.inv_freq, default_inv_freq(pretrained.geometry)):
        raise RopeScalingError(
            f"{type(slot.module).__name__} computes frequencies other than b^(-2i/R); this library cannot scale them."
        )
    if patch_state(slot) is not None or pretrained.length_dependent or slot.inv_freq.is_meta:
        return
    # A config that records a patch states the frequencies of that patch.
    recorded = checkpoint.record is not None
    expected = frequencies_from_config(slot, slot.config)[0] if recorded else pretrained.inv_freq
    in_module = slot.inv_freq.float().cpu()
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3}.get(slot.inv_freq.dtype, 1e-2)
    if in_module.shape != expected.shape or not torch.allclose(
        in_module, expected, rtol=rounding, atol=1e-7 if rounding > 1e-5 else 1e-30
    ):
        raise RopeScalingError(
            f"The frequencies in `{slot.path}` are not those of the model's config, so one of the two was changed "
            "after loading. Transformers reads the config only when it builds a model: load the model again and "
            "patch it."
        )
