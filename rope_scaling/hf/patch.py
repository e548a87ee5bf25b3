"""`patch`, `unpatch` and `patched`: a loaded model, changed in place, provably, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rope_scaling.errors import RopeScalingError, check_length
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.attention import install, installed, remove
from rope_scaling.hf.both_ways import WindowProgram
from rope_scaling.hf.configs import config_of, config_state, own_configs, set_config
from rope_scaling.hf.decoders import make_programs
from rope_scaling.hf.effect import check_felt, warn_of_windows
from rope_scaling.hf.extend import Extension, as_it_arrived, extend, matches, target_length
from rope_scaling.hf.guard import Guard, guard, unguard
from rope_scaling.hf.layer_spans import SpanProgram
from rope_scaling.hf.loud import fail_in_plain_transformers
from rope_scaling.hf.pretrained import (
    RECORD_KEY,
    Pretrained,
    host_frequencies,
    method_text,
    pretrained_settings,
    read_pretrained,
)
from rope_scaling.hf.record import ACTIVATION_KEYS, check_record, make_record, method_from_record
from rope_scaling.hf.reference_models import watch_trainers
from rope_scaling.hf.resolve import NamedMethod, Resolved, choose_slots, resolve_methods, resolved
from rope_scaling.hf.rotary import Slot, patched_place, patched_record, restore, rotary_slots, set_record
from rope_scaling.hf.s2 import has_s2_attention
from rope_scaling.hf.softmax import scale_softmax
from rope_scaling.hf.tables import TableSlot, rope_parameters_of
from rope_scaling.methods import Method


@dataclass(frozen=True)
class Patch:
    """What `patch` did to one slot; `describe` reads it."""

    method: FrequencyMethod | None
    target_length: int
    pretrained: Pretrained
    extension: Extension


@dataclass(frozen=True)
class Applied:
    """A whole patch, as every patched module remembers it."""

    patches: dict[tuple[str, str | None], Patch]
    """By path of the module and layer type."""
    config_before: dict[str, Any]
    """Attributes of the config before the patch; those it did not have are absent."""
    methods: tuple[Method, ...] = ()
    """All of it, the frequency method first."""
    programs: dict[str, SpanProgram | WindowProgram] = field(default_factory=dict)
    """What attention does other than the model's, by path of the decoder."""


def patch(
    model: nn.Module,
    *method: str | Method | NamedMethod | Sequence[Method],
    factor: float | None = None,
    target_length: int | None = None,
    original_max_position_embeddings: int | None = None,
    layer_types: str | Sequence[str] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Makes a loaded model read further than it was trained to, in place.

    ```python
    rope_scaling.patch(model, "yarn", factor=4)
    rope_scaling.patch(model, Yarn(factor=2), SlidingWindow(window=1024, num_sinks=4))
    ```

    With a frequency method, the model's frequencies, its config and so everything that `save_pretrained` writes change
    together; plain Transformers loads the result to the same logits. Methods of spans and temperatures live in
    attention: a checkpoint saved with one fails to load in plain Transformers, with the name of what loads it,
    `rope_scaling.from_pretrained`. A model that is patched already is first taken back to what it was. A model that
    arrives scaled is extended from there (see `describe` for the arithmetic): `factor` multiplies the length that it
    reads as it arrives.

    Args:
        model (`nn.Module`): A loaded Transformers model, bare or wrapped (PEFT, accelerate, `torch.compile`).
        *method (`str` or method object): A name in `rope_scaling.METHODS`, with its fields as further arguments; or
            one or more method objects, or pairs of a name and its fields, at most one each that decides frequencies,
            distances, the keys seen, and the temperature. Without any, what the config of a saved patched model
            records.
        factor (`float`, *optional*): Target length over the length the model reads as it arrives, at least 1.
        target_length (`int`, *optional*): The same in tokens. A method made for a length needs one of the two; with
            others (`abf` with a base, `drope`, ...) it only sets the length written to the config.
        original_max_position_embeddings (`int`, *optional*): Trained length in tokens, where the config has none.
        layer_types (`str` or list of `str`, *optional*): In models whose layer types rotate differently, the types to
            scale, or `"all"`. By default full attention only.
        **arguments: Fields of the method, when it is given by name.

    Returns:
        `nn.Module`: the model itself.

    Raises:
        RopeScalingError: bad arguments, a model without RoPE, attention that cannot be reached, or a change that could
            not be verified on the module; the model is left as it was.
    """
    slots = rotary_slots(model)
    if not method or method == (None,):
        given = {"factor": factor, "target_length": target_length, "layer_types": layer_types, **arguments}
        given["original_max_position_embeddings"] = original_max_position_embeddings
        if leftover := [name for name, value in given.items() if value is not None]:
            raise RopeScalingError(
                f"{', '.join(leftover)} given without a method. Name one, as in `patch(model, 'yarn', factor=4)`."
            )
        return _apply_record(model, slots, _recorded(slots), from_record=True)
    if original_max_position_embeddings is not None:
        original_max_position_embeddings = check_length(
            "original_max_position_embeddings", original_max_position_embeddings
        )
    settings = pretrained_settings(config_of(slots))
    chosen = choose_slots(slots, layer_types)
    reach = max(read_pretrained(slot, settings, original_max_position_embeddings).reach for slot in chosen)
    wanted = resolve_methods(method, reach, factor, target_length, arguments)
    names = None if chosen[0].layer_type is None else sorted({slot.layer_type for slot in chosen if slot.layer_type})
    return _apply(model, slots, wanted, original_max_position_embeddings, names)


def patch_as_recorded(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Patches a model as a record from elsewhere says, such as that of an adapter.

    Raises:
        RopeScalingError: the record is damaged, or was made on a model of other rotary settings or lengths.
    """
    slots = rotary_slots(model)
    made_on = check_record(record)["pretrained"]
    config = config_of(slots)
    found = {name: getattr(config, name, None) for name in ACTIVATION_KEYS} | pretrained_settings(config)
    if different := [name for name, value in made_on.items() if found.get(name) != value]:
        changes = "; ".join(f"`{name}` there {made_on[name]}, here {found.get(name)}" for name in different)
        raise RopeScalingError(
            f"The recorded patch was made on another model: {changes}. Load the base model that it names."
        )
    return _apply_record(model, slots, record)


def patch_record(model: nn.Module) -> dict[str, Any] | None:
    """The record of the patch that a model carries, in effect or only in its config; `None` without one."""
    record = getattr(config_of(rotary_slots(model)), RECORD_KEY, None)
    return None if record is None else copy.deepcopy(check_record(record))


def unpatch(model: nn.Module) -> nn.Module:
    """Takes a patched model back to its pretrained frequencies and config: its logits are bit for bit the old ones.

    A model that was saved patched and loaded by plain Transformers is taken back to what its record says it was.

    Returns:
        `nn.Module`: the model itself.

    Raises:
        RopeScalingError: the model is not patched.
    """
    slots = rotary_slots(model)
    record = _recorded(slots, "This model is not patched: there is nothing to take back.")
    _roll_back(model, slots)
    if hasattr(config_of(slots), RECORD_KEY):
        _load(model, slots, record["pretrained"])
    return model


@contextmanager
def patched(
    model: nn.Module, *method: str | Method | NamedMethod | Sequence[Method], **arguments: Any
) -> Iterator[nn.Module]:
    """`patch` for the length of a `with` block; afterwards the model is as it was before, patched or not.

    Raises:
        RopeScalingError: as `patch` does.
    """
    slots = rotary_slots(model)
    before = applied_patch(slots)
    config = config_state(config_of(slots))
    patch(model, *method, **arguments)
    try:
        yield model
    finally:
        _roll_back(model, slots)
        if before is not None:
            _commit(model, slots, before, config)


def patched_in_attention(model: nn.Module) -> bool:
    """Whether a patch in effect decides what attention computes: a span method or a temperature."""
    applied = applied_patch(rotary_slots(model))
    return applied is not None and bool(applied.programs)


def applied_patch(slots: list[Slot]) -> Applied | None:
    """The patch in effect on a model's slots, or `None`; by the names that modules have now, whatever wraps them."""
    record: Applied | None = next((found for slot in slots if (found := patched_record(slot))), None)
    if record is None:
        return None
    patches, programs = {}, {}
    for slot in slots:
        if patched_record(slot) is not None:
            path, decoder = patched_place(slot)
            if (path, slot.layer_type) in record.patches:
                patches[slot.path, slot.layer_type] = record.patches[path, slot.layer_type]
            if decoder in record.programs:
                programs[slot.decoder] = record.programs[decoder]
    return replace(record, patches=patches, programs=programs)


def _apply(
    model: nn.Module,
    slots: list[Slot],
    wanted: Resolved,
    original_length: int | None,
    layer_types: list[str] | None,
    from_record: bool = False,
) -> nn.Module:
    """Computes everything first, then changes the model, then verifies it; a failure leaves it as it was."""
    config = config_of(slots)
    settings = pretrained_settings(config)
    parameters = copy.deepcopy(settings["rope_parameters"])
    in_attention = bool(wanted.spans or wanted.temperature)
    patches = {}
    for slot in slots:
        if slot.layer_type is not None and slot.layer_type not in (layer_types or ()):
            continue
        change = _slot_patch(slot, settings, wanted, original_length)
        patches[slot.path, slot.layer_type] = change
        parameters = slot.with_part(parameters, change.extension.rope_parameters)
    if in_attention and wanted.frequency is None:
        parameters = copy.deepcopy(settings["rope_parameters"])
    after = {"rope_parameters": parameters}
    guarded = in_attention or not slots[0].in_config
    if guarded:
        after = fail_in_plain_transformers(slots, parameters, settings["max_position_embeddings"])
    allowed = (after["rope_parameters"], settings["rope_parameters"])[: 2 if guarded else 1]
    if from_record and config.rope_parameters not in allowed:
        raise RopeScalingError(
            "The config's `rope_parameters` are not those of the patch it records: one of the two was edited. "
            "Name the method you want, as in `patch(model, 'yarn', factor=4)`; it starts from the pretrained state."
        )
    if in_attention and any(has_s2_attention(model.get_submodule(slot.decoder)) for slot in slots):
        raise RopeScalingError(
            "This model has S2 attention, which cannot be combined with a span method or a temperature: both decide "
            "what attention computes. Call `remove_s2_attention(model)` first, or patch with a frequency method."
        )
    programs = make_programs(model, slots, patches, wanted) if in_attention else {}
    target = max(change.target_length for change in patches.values())
    check_felt(model, slots, set(patches), target)
    if not wanted.spans:
        warn_of_windows(config, target)
    after["max_position_embeddings"] = target
    stated = wanted.target_length if in_attention else target
    for name in ACTIVATION_KEYS:
        if name in after:
            settings.setdefault(name, getattr(config, name))
    after[RECORD_KEY] = make_record(wanted.methods, stated, layer_types, original_length, settings)
    outer, outer_config = applied_patch(slots), config_state(config)
    if outer is not None:
        _roll_back(model, slots)
    applied = Applied(patches, config_state(config_of(slots)), wanted.methods, programs)
    try:
        _commit(model, slots, applied, after)
    except Exception:
        _roll_back(model, slots)
        if outer is not None:
            _commit(model, slots, outer, outer_config)
        raise
    return model


def _apply_record(model: nn.Module, slots: list[Slot], record: dict[str, Any], from_record: bool = False) -> nn.Module:
    methods = resolved([method_from_record(one) for one in record["methods"]], record["target_length"])
    original, types = record["original_max_position_embeddings"], record["layer_types"]
    choose_slots(slots, types)  # refuses layer types that this model does not have
    return _apply(model, slots, methods, original, types, from_record)


def _slot_patch(slot: Slot, settings: dict[str, Any], wanted: Resolved, original_length: int | None) -> Patch:
    pretrained = read_pretrained(slot, settings, original_length)
    _check_as_configured(slot, pretrained)
    if wanted.frequency is None:
        if wanted.target_length is None and isinstance(slot, TableSlot) and slot.ends_at(pretrained.reach):
            raise RopeScalingError(
                f"{type(slot.module).__name__} looks its angles up in a table with a row for every position, which "
                f"has {pretrained.reach}. Say how far to read: `patch(..., target_length={2 * pretrained.reach})`."
            )
        own_target = max(wanted.target_length or 0, pretrained.reach)
        return Patch(None, own_target, pretrained, as_it_arrived(pretrained))
    own_target = target_length(pretrained, wanted.frequency, wanted.target_length)
    extension = extend(slot, pretrained, wanted.frequency, own_target)
    same = torch.equal(extension.inv_freq, pretrained.inv_freq)
    if same and extension.attention_factor == pretrained.attention_factor:
        raise RopeScalingError(f"{wanted.frequency} changes nothing on this model: every frequency stays as it is.")
    return Patch(wanted.frequency, own_target, pretrained, extension)


def _commit(model: nn.Module, slots: list[Slot], applied: Applied, config: dict[str, Any]) -> None:
    own_configs(model)
    watch_trainers()
    for slot in slots:
        if change := applied.patches.get((slot.path, slot.layer_type)):
            slot.set(change.extension.inv_freq, change.extension.attention_factor, change.target_length)
            scale_softmax(model, slot, change.extension.rope_parameters)
            set_record(slot, applied)
    set_config(model, slots, config)
    for slot in slots:
        if (change := applied.patches.get((slot.path, slot.layer_type))) and not slot.inv_freq.is_meta:
            _verify(slot, change)
    for path, program in applied.programs.items():
        decoder = model.get_submodule(path)
        install(decoder, program)
        if installed(decoder) is not program:
            raise RopeScalingError(
                f"The patch did not take effect on the attention of `{path or type(model).__name__}`."
            )
    text = " + ".join(map(method_text, applied.methods))
    for path in {slot.decoder for slot in slots}:
        own = [slot for slot in slots if slot.decoder == path and (slot.path, slot.layer_type) in applied.patches]
        if own:
            patches = [applied.patches[slot.path, slot.layer_type] for slot in own]
            guard(model.get_submodule(path), Guard(model, path, own, patches, applied.programs.get(path), text))


def _verify(slot: Slot, change: Patch) -> None:
    if not slot.holds(change.extension.inv_freq, change.extension.attention_factor):
        raise RopeScalingError(
            f"The patch did not take effect on `{slot.path}` ({type(slot.module).__name__}): its frequencies, read "
            "back, are not those of the method. The model was left as it was; please report the model class."
        )


def _check_as_configured(slot: Slot, pretrained: Pretrained) -> None:
    """Refuses a module whose frequencies are not those of its config: something else has changed one of them."""
    if pretrained.method is None and not matches(pretrained.inv_freq, default_inv_freq(pretrained.geometry)):
        raise RopeScalingError(
            f"{type(slot.module).__name__} computes frequencies other than b^(-2i/R); this library cannot scale them."
        )
    if patched_record(slot) is not None or pretrained.length_dependent or slot.inv_freq.is_meta:
        return
    expected, _ = host_frequencies(slot, slot.config)
    found = slot.inv_freq.float().cpu()
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3}.get(slot.inv_freq.dtype, 1e-2)
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=rounding, atol=1e-7 if rounding > 1e-5 else 1e-30
    ):
        raise RopeScalingError(
            f"The frequencies in `{slot.path}` are not those of the model's config, so one of the two was changed "
            "after loading. Transformers reads the config only when it builds a model: load the model again and "
            "patch it."
        )


def _recorded(slots: list[Slot], otherwise: str | None = None) -> dict[str, Any]:
    record = getattr(config_of(slots), RECORD_KEY, None)
    if record is None:
        raise RopeScalingError(
            otherwise
            or "The model's config has no record of a patch. Name a method, as in `patch(model, 'yarn', factor=4)`."
        )
    return check_record(record)


def _roll_back(model: nn.Module, slots: list[Slot]) -> None:
    applied = applied_patch(slots)
    own_configs(model)
    for path in {slot.decoder for slot in slots}:
        unguard(model.get_submodule(path))
        remove(model.get_submodule(path))
    for module in {id(slot.module): slot.module for slot in slots}.values():
        restore(module)
    if applied is not None:
        set_config(model, slots, applied.config_before, whole=True)
        for slot in slots:
            if change := applied.patches.get((slot.path, slot.layer_type)):
                scale_softmax(model, slot, change.pretrained.rope_parameters)


def _load(model: nn.Module, slots: list[Slot], settings: dict[str, Any]) -> None:
    """Gives modules that hold a saved patch the frequencies of the pretrained settings, as loading those would."""
    set_config(model, slots, settings)
    for slot in slots:
        inv_freq, attention_factor = host_frequencies(slot, slot.config)
        slot.load(inv_freq, attention_factor, rope_parameters_of(slot.config))
        scale_softmax(model, slot, slot.part_of(rope_parameters_of(slot.config)))
