"""From the methods of a patch to what every layer of a model's decoders does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.bidirectional import WindowProgram, window_program
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.compat import layer_configs
from rope_scaling.hf.configs import windows_of
from rope_scaling.hf.layer_spans import Layer, SpanProgram
from rope_scaling.hf.layout_detection import detect_layouts
from rope_scaling.hf.model_patch import SlotPatch
from rope_scaling.hf.patch_arguments import PatchMethods
from rope_scaling.hf.pretrained_rope import PretrainedRope, frequencies_from_config
from rope_scaling.hf.rescaling import closed_form
from rope_scaling.hf.slot import Slot, SlotKey
from rope_scaling.spans import Rope


_FULL = {None, "full_attention", "hybrid"}
"""Kinds of layers with plain causal attention; those called `hybrid` have a recurrence beside it."""
_WINDOWED = {"sliding_attention", "hybrid_sliding"}
_CHUNKED = {"chunked_attention"}


@dataclass(frozen=True)
class _Scaled:
    """Frequencies under a further method, for the model as loaded."""

    pretrained: PretrainedRope

    def __call__(self, method: FrequencyMethod) -> tuple[torch.Tensor, float]:
        form = closed_form(self.pretrained, method)
        return form.inv_freq, form.attention_factor


def make_programs(
    checkpoint: Checkpoint, patched: Mapping[SlotKey, SlotPatch], methods: PatchMethods
) -> dict[str, SpanProgram | WindowProgram]:
    """A program for every decoder of a model, by its path.

    Raises:
        RopeScalingError: layers of a kind that spans cannot express, attention that cannot be patched, methods that do
            not suit the model, or a target length beyond theirs.
    """
    programs = {}
    for path in sorted({slot.decoder for slot in checkpoint.slots if slot.key in patched}):
        slots = [slot for slot in checkpoint.slots if slot.decoder == path]
        programs[path] = _program(checkpoint.model.get_submodule(path), slots, patched, methods)
    return programs


def _program(decoder: Any, slots: list[Slot], patched: Mapping[SlotKey, SlotPatch], methods: PatchMethods) -> Any:
    config = decoder.config
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    silent = [index for index, kind in enumerate(types) if kind not in _FULL | _WINDOWED | _CHUNKED]
    windows = windows_of(config)
    chunks = [getattr(layer, "attention_chunk_size", None) for layer in layer_configs(config)]
    inv_freqs = [_frequencies_now(slot) for slot in slots]
    detected = detect_layouts(decoder, inv_freqs, silent)
    if detected.facts.is_bidirectional:
        reach = next(iter(patched.values())).pretrained.reach
        return window_program(decoder, methods.spans, methods.temperature, reach)
    if odd := sorted({types[index] for index in silent if index in detected.heard}):
        raise RopeScalingError(
            f"{type(decoder).__name__} has layers of the kind {odd[0]!r}, whose attention spans cannot express. "
            "Frequency methods work on it."
        )
    ropes = {index: _rope(slot, patched, methods, config) for index, slot in enumerate(slots)}
    layers = []
    for place, (kind, rotation) in enumerate(zip(types, detected.layouts, strict=True)):
        index, layout = rotation or (0, RotaryLayout(2 * len(slots[0].inv_freq)))
        index = _slot_of_layer(slots, inv_freqs, index, kind)
        # A config without layer types and with a window has it in every layer, or states one that is never used.
        window = windows[place] if kind in {None, *_WINDOWED} and windows[place] in detected.facts.windows else None
        chunk = chunks[place] if kind in _CHUNKED and chunks[place] in detected.facts.windows else None
        rope = ropes[index] if rotation else None
        layers.append(Layer(rope, layout, slots[index].key in patched, window, chunk, place not in silent))
    if not any(layer.rope for layer in layers if layer.scaled):
        raise RopeScalingError(
            f"None of the selected layers of {type(decoder).__name__} uses RoPE. Check `layer_types`."
        )
    program = SpanProgram(methods.spans, methods.temperature, layers)
    if program.reach is not None and methods.target_length is not None and methods.target_length > program.reach:
        names = " with ".join(method.name or type(method).__name__ for method in methods.spans)
        raise RopeScalingError(
            f"{names} supports {program.reach} tokens on this model with these settings, and "
            f"{methods.target_length} are wanted. Give settings for a longer context (larger groups, a steeper slope, "
            "a smaller window), or a smaller target."
        )
    return program


def _frequencies_now(slot: Slot) -> torch.Tensor:
    """What a module holds, or would hold if its buffers were not on the meta device."""
    return frequencies_from_config(slot, slot.config)[0] if slot.inv_freq.is_meta else slot.inv_freq


def _slot_of_layer(slots: list[Slot], inv_freqs: list[torch.Tensor], detected: int, kind: str | None) -> int:
    """The slot of a layer's own kind, where several hold the frequencies that were detected."""
    same = [
        index
        for index, slot in enumerate(slots)
        if slot.layer_type == kind and torch.equal(inv_freqs[index], inv_freqs[detected])
    ]
    return same[0] if same else detected


def _rope(slot: Slot, patched: Mapping[SlotKey, SlotPatch], methods: PatchMethods, config: Any) -> Rope:
    change = patched.get(slot.key)
    if change is None:
        # Not for this layer type: only its own angles matter.
        other = next(iter(patched.values())).pretrained
        return Rope(other.geometry, slot.inv_freq.detach().double().cpu(), other.reach)
    return Rope(
        geometry=change.pretrained.geometry,
        inv_freq=change.inv_freq.double(),
        trained_length=change.trained_length,
        target_length=methods.target_length,
        attention_factor=change.attention_factor,
        scaled=_Scaled(change.pretrained),
        num_layers=config.num_hidden_layers,
    )
