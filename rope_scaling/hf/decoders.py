"""From resolved methods to what every layer of a model's decoders does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.hf.both_ways import WindowProgram, window_program
from rope_scaling.hf.extend import closed_form
from rope_scaling.hf.layer_spans import Layer, SpanProgram
from rope_scaling.hf.pretrained import Pretrained, factor_of, host_frequencies, layer_configs, windows_of
from rope_scaling.hf.probe import look_at
from rope_scaling.hf.resolve import Resolved
from rope_scaling.hf.rotary import Slot
from rope_scaling.spans import Rope


_FULL = {None, "full_attention", "hybrid"}
"""Kinds of layers with plain causal attention; those called `hybrid` have a recurrence beside it."""
_WINDOWED = {"sliding_attention", "hybrid_sliding"}
_CHUNKED = {"chunked_attention"}


@dataclass(frozen=True)
class _Scaled:
    """Frequencies under a further method, for the model as it arrived."""

    pretrained: Pretrained

    def __call__(self, method: FrequencyMethod) -> tuple[torch.Tensor, float]:
        return closed_form(self.pretrained, method)[:2]


def make_programs(
    model: nn.Module, slots: list[Slot], patches: dict[tuple[str, str | None], Any], wanted: Resolved
) -> dict[str, SpanProgram | WindowProgram]:
    """A program for every decoder of a model, by its path.

    Raises:
        RopeScalingError: layers of a kind that spans cannot express, attention that cannot be reached, methods that do
            not suit the model, or a wanted length beyond their reach.
    """
    programs = {}
    for path in sorted({slot.decoder for slot in slots if (slot.path, slot.layer_type) in patches}):
        its_slots = [slot for slot in slots if slot.decoder == path]
        programs[path] = _program(model.get_submodule(path), its_slots, patches, wanted)
    return programs


def _program(decoder: Any, slots: list[Slot], patches: dict[tuple[str, str | None], Any], wanted: Resolved) -> Any:
    config = decoder.config
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    silent = [index for index, kind in enumerate(types) if kind not in _FULL | _WINDOWED | _CHUNKED]
    windows = windows_of(config)
    chunks = [getattr(one, "attention_chunk_size", None) for one in layer_configs(config)]
    inv_freqs = [host_frequencies(slot, slot.config)[0] if slot.inv_freq.is_meta else slot.inv_freq for slot in slots]
    look = look_at(decoder, inv_freqs, silent)
    if look.noted.both_ways:
        reach = next(iter(patches.values())).pretrained.reach
        return window_program(decoder, wanted.spans, wanted.temperature, reach)
    if odd := sorted({types[index] for index in silent if index in look.heard}):
        raise RopeScalingError(
            f"{type(decoder).__name__} has layers of the kind {odd[0]!r}, whose attention spans cannot express. "
            "Frequency methods work on it."
        )
    ropes = {index: _rope(slot, patches, wanted, config) for index, slot in enumerate(slots)}
    layers = []
    for place, (kind, found) in enumerate(zip(types, look.layouts, strict=True)):
        index, layout = found or (0, RotaryLayout(2 * len(slots[0].inv_freq)))
        index = _own_slot(slots, inv_freqs, index, kind)
        scaled = (slots[index].path, slots[index].layer_type) in patches
        # A config without layer types and with a window has it in every layer, or states one that is never used.
        its_window = windows[place] if kind in {None, *_WINDOWED} and windows[place] in look.noted.windows else None
        its_chunk = chunks[place] if kind in _CHUNKED and chunks[place] in look.noted.windows else None
        layers.append(
            Layer(ropes[index] if found else None, layout, scaled, its_window, its_chunk, place not in silent)
        )
    if not any(layer.rope for layer in layers if layer.scaled):
        raise RopeScalingError(f"No layer of {type(decoder).__name__} that the patch is for turns queries and keys.")
    program = SpanProgram(wanted.spans, wanted.temperature, layers)
    if program.reach is not None and wanted.target_length is not None and wanted.target_length > program.reach:
        names = " with ".join(method.name or type(method).__name__ for method in wanted.spans)
        raise RopeScalingError(
            f"{names} reaches {program.reach} tokens on this model with these settings, and "
            f"{wanted.target_length} are wanted. Give settings that reach further (larger groups, a steeper slope, a "
            "smaller window), or a smaller target."
        )
    return program


def _own_slot(slots: list[Slot], inv_freqs: list[torch.Tensor], found: int, kind: str | None) -> int:
    """The slot of a layer's own kind, where several hold the frequencies that were found."""
    same = [
        index
        for index, slot in enumerate(slots)
        if slot.layer_type == kind and torch.equal(inv_freqs[index], inv_freqs[found])
    ]
    return same[0] if same else found


def _rope(slot: Slot, patches: dict[tuple[str, str | None], Any], wanted: Resolved, config: Any) -> Rope:
    change = patches.get((slot.path, slot.layer_type))
    if change is None:
        # Not for this layer type: only its own turns matter.
        some: Pretrained = next(iter(patches.values())).pretrained
        return Rope(some.geometry, slot.inv_freq.detach().double().cpu(), some.reach)
    pretrained = change.pretrained
    return Rope(
        geometry=pretrained.geometry,
        inv_freq=change.extension.inv_freq.double(),
        trained_length=int(pretrained.reach * factor_of(change.method)) if change.method else pretrained.reach,
        target_length=wanted.target_length,
        attention_factor=change.extension.attention_factor,
        scaled=_Scaled(pretrained),
        num_layers=config.num_hidden_layers,
    )
