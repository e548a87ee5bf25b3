"""A patch worked out for one model, put on it and taken off; no other file does either."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.attention import install, installed, remove
from rope_scaling.hf.bidirectional import WindowProgram
from rope_scaling.hf.compat import scale_softmax
from rope_scaling.hf.configs import RECORD_KEY, config_state, own_configs, rope_parameters_of, set_config
from rope_scaling.hf.guard import Guard, guard, unguard
from rope_scaling.hf.layer_spans import SpanProgram
from rope_scaling.hf.pretrained_rope import PretrainedRope, frequencies_from_config
from rope_scaling.hf.reference_models import watch_trainers
from rope_scaling.hf.rescaling import Rescaling
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.hf.slot import Slot, SlotKey, configs_of, patch_state, restore, set_patch_state
from rope_scaling.methods import Method, method_text


@dataclass(frozen=True)
class SlotPatch:
    """What one slot gets."""

    pretrained: PretrainedRope
    target_length: int
    """Tokens that it is to read."""
    rescaling: Rescaling | None
    """`None` without a frequency method: the frequencies stay as loaded."""
    trained_length: int
    """Tokens up to which the frequencies are good: span methods and temperatures count from there."""

    @property
    def inv_freq(self) -> torch.Tensor:
        """`[R / 2]`, float32."""
        return (self.rescaling or self.pretrained).inv_freq

    @property
    def attention_factor(self) -> float:
        """Multiplier of cos and sin."""
        return (self.rescaling or self.pretrained).attention_factor

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The slot's part of the config from which Transformers computes these frequencies."""
        return (self.rescaling or self.pretrained).rope_parameters


@dataclass(frozen=True)
class Patch:
    """A whole patch; `plan_patch` works it out, and every patched module holds it."""

    slots: dict[SlotKey, SlotPatch]
    """By name of the rotary module and layer type."""
    methods: tuple[Method, ...]
    """All of them, the frequency method first."""
    config_values: dict[str, Any]
    """Attributes that the config gets, the record of the patch among them."""
    programs: dict[str, SpanProgram | WindowProgram] = field(default_factory=dict)
    """By name of the decoder, what its attention does other than the model's own."""

    @property
    def record(self) -> dict[str, Any]:
        """The patch as plain data, as the config records it."""
        return self.config_values[RECORD_KEY]

    def apply(self, model: nn.Module) -> None:
        """Changes a model, in place of the patch that it carries, and verifies the change by reading it back.

        Raises:
            RopeScalingError: the model lacks the modules that the patch is for, or a change did not take effect; the
                model is left as it was.
        """
        slots = rotary_slots(model)
        if missing := self.slots.keys() - {slot.key for slot in slots}:
            raise RopeScalingError(
                f"This patch was planned for another model: {type(model).__name__} has no rotary module "
                f"`{min(missing)[0]}`. Plan it on the model itself."
            )
        outer, config = applied_patch(slots), slots[0].config
        if outer is not None:
            outer = replace(outer, config_values=config_state(config))
            outer.revert(model)
        detach(model, slots)  # what is left of a patch whose modules were replaced
        before = config_state(slots[0].config)
        try:
            self._put_on(model, slots, before)
        except Exception:
            self._take_off(model, slots, before)
            if outer is not None:
                outer.apply(model)
            raise

    def revert(self, model: nn.Module) -> None:
        """Takes the patch off a model that carries it: everything is as it was before, to the bit.

        Raises:
            RopeScalingError: the model carries no patch.
        """
        slots = rotary_slots(model)
        carried = applied_patch(slots)
        if carried is None:
            raise RopeScalingError("This model is not patched: there is nothing to revert.")
        before = next(state.config_before for slot in slots if (state := patch_state(slot)) is not None)
        carried._take_off(model, slots, before)

    def _put_on(self, model: nn.Module, slots: list[Slot], before: dict[str, Any]) -> None:
        own_configs(model)
        watch_trainers()
        patched = [(slot, self.slots[slot.key]) for slot in slots if slot.key in self.slots]
        for slot, change in patched:
            slot.set(change.inv_freq, change.attention_factor, change.target_length)
            scale_softmax(model.get_submodule(slot.decoder), slot.layer_type, change.rope_parameters)
            set_patch_state(slot, self, before)
        set_config(model, configs_of(slots), self.config_values)
        for slot, change in patched:
            if not slot.inv_freq.is_meta:
                _verify(slot, change)
        for path, program in self.programs.items():
            decoder = model.get_submodule(path)
            install(decoder, program)
            if installed(decoder) is not program:
                raise RopeScalingError(
                    f"The patch did not take effect on the attention of `{path or type(model).__name__}`."
                )
        text = " + ".join(map(method_text, self.methods))
        for path in {slot.decoder for slot, _ in patched}:
            own = {slot: change for slot, change in patched if slot.decoder == path}
            watch = Guard(model, path, list(own), list(own.values()), self.programs.get(path), text)
            guard(model.get_submodule(path), watch)

    def _take_off(self, model: nn.Module, slots: list[Slot], before: dict[str, Any]) -> None:
        own_configs(model)
        detach(model, slots)
        set_config(model, configs_of(slots), before, whole=True)
        for slot in slots:
            if change := self.slots.get(slot.key):
                parameters = change.pretrained.rope_parameters
                scale_softmax(model.get_submodule(slot.decoder), slot.layer_type, parameters)


def applied_patch(slots: Iterable[Slot]) -> Patch | None:
    """The patch in effect on a model's slots, or `None`; by the names that modules have now, whatever wraps them."""
    states = [(slot, state) for slot in slots if (state := patch_state(slot)) is not None]
    if not states:
        return None
    patch: Patch = states[0][1].patch
    changes = {slot.key: patch.slots.get((state.path, slot.layer_type)) for slot, state in states}
    programs = {slot.decoder: patch.programs.get(state.decoder) for slot, state in states}
    return replace(
        patch,
        slots={key: change for key, change in changes.items() if change is not None},
        programs={path: program for path, program in programs.items() if program is not None},
    )


def detach(model: nn.Module, slots: Iterable[Slot]) -> None:
    """Takes hooks and frequencies of a patch off a model, what other code left of them included."""
    for path in {slot.decoder for slot in slots}:
        unguard(model.get_submodule(path))
        remove(model.get_submodule(path))
    for module in {id(slot.module): slot.module for slot in slots}.values():
        restore(module)


def load_settings(model: nn.Module, slots: Iterable[Slot], settings: dict[str, Any]) -> None:
    """Gives a model that was saved patched and loaded by plain Transformers its pretrained frequencies and config, as
    loading those would.

    Args:
        model (`nn.Module`): The model, without a patch in effect.
        slots (iterable of `Slot`): All of its slots.
        settings (`dict[str, Any]`): `max_position_embeddings` and `rope_parameters` before the patch, as recorded.
    """
    own_configs(model)
    set_config(model, configs_of(slots), settings)
    for slot in slots:
        parameters = rope_parameters_of(slot.config)
        slot.load(*frequencies_from_config(slot, slot.config), parameters)
        scale_softmax(model.get_submodule(slot.decoder), slot.layer_type, slot.part_of(parameters))


def _verify(slot: Slot, change: SlotPatch) -> None:
    if not slot.holds(change.inv_freq, change.attention_factor):
        raise RopeScalingError(
            f"The patch did not take effect on `{slot.path}` ({type(slot.module).__name__}): its frequencies, read "
            "back, are not those of the method. The model is unchanged; please report the model class."
        )
