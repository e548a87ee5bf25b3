"""`patch`, `unpatch` and `patched`: a loaded model, changed in place, provably, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.checkpoint import Checkpoint, read_checkpoint
from rope_scaling.hf.configs import RECORD_KEY, config_state
from rope_scaling.hf.model_patch import applied_patch, detach, load_settings
from rope_scaling.hf.patch_arguments import PatchArguments
from rope_scaling.hf.patch_plan import plan_patch
from rope_scaling.hf.record import ACTIVATION_KEYS, check_record
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.methods import Method, NamedMethod


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
    is loaded scaled is extended from there (see `describe` for the arithmetic): `factor` multiplies the length that it
    reads as loaded.

    Args:
        model (`nn.Module`): A loaded Transformers model, bare or wrapped (PEFT, accelerate, `torch.compile`).
        *method (`str` or method object): A name in `rope_scaling.METHODS`, with its fields as further arguments; or
            one or more method objects, or pairs of a name and its fields, at most one each that decides frequencies,
            distances, the keys seen, and the temperature. Without any, what the config of a saved patched model
            records.
        factor (`float`, *optional*): Target length over the length the model reads as loaded, at least 1.
        target_length (`int`, *optional*): The same in tokens. A method made for a length needs one of the two; with
            others (`abf` with a base, `drope`, ...) it only sets the length written to the config.
        original_max_position_embeddings (`int`, *optional*): Trained length in tokens, where the config has none.
        layer_types (`str` or list of `str`, *optional*): In models whose layer types rotate differently, the types to
            scale, or `"all"`. By default full attention only.
        **arguments: Fields of the method, when it is given by name.

    Returns:
        `nn.Module`: the model itself.

    Raises:
        RopeScalingError: bad arguments, a model without RoPE, attention that cannot be patched, or a change that could
            not be verified on the module; the model is left as it was.
    """
    checkpoint = read_checkpoint(model)
    if not method or method == (None,):
        given = {"factor": factor, "target_length": target_length, "layer_types": layer_types, **arguments}
        given["original_max_position_embeddings"] = original_max_position_embeddings
        if leftover := [name for name, value in given.items() if value is not None]:
            raise RopeScalingError(
                f"{', '.join(leftover)} given without a method. Name one, as in `patch(model, 'yarn', factor=4)`."
            )
        if (record := checkpoint.record) is None:
            raise RopeScalingError(
                "The model's config has no record of a patch. Name a method, as in `patch(model, 'yarn', factor=4)`."
            )
        return _patched_with(checkpoint, PatchArguments.from_record(record, recorded=True))
    parsed = PatchArguments.parse(
        *method,
        factor=factor,
        target_length=target_length,
        original_max_position_embeddings=original_max_position_embeddings,
        layer_types=layer_types,
        **arguments,
    )
    return _patched_with(checkpoint, parsed)


def _patched_with(checkpoint: Checkpoint, arguments: PatchArguments) -> nn.Module:
    plan_patch(checkpoint, arguments).apply(checkpoint.model)
    return checkpoint.model


def patch_as_recorded(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Patches a model as a record from elsewhere says, such as that of an adapter.

    Raises:
        RopeScalingError: the record is damaged, or was made on a model of other rotary settings or lengths.
    """
    checkpoint = read_checkpoint(model)
    record = check_record(record)
    made_on = record["pretrained"]
    here = {name: getattr(checkpoint.config, name, None) for name in ACTIVATION_KEYS} | checkpoint.settings
    if different := [name for name, value in made_on.items() if here.get(name) != value]:
        changes = "; ".join(f"`{name}` there {made_on[name]}, here {here.get(name)}" for name in different)
        raise RopeScalingError(
            f"The recorded patch was made on another model: {changes}. Load the base model that it names."
        )
    return _patched_with(checkpoint, PatchArguments.from_record(record))


def patch_record(model: nn.Module) -> dict[str, Any] | None:
    """The record of the patch that a model carries, in effect or only in its config; `None` without one."""
    return copy.deepcopy(read_checkpoint(model).record)


def unpatch(model: nn.Module) -> nn.Module:
    """Takes a patched model back to its pretrained frequencies and config: its logits are bit for bit the old ones.

    A model that was saved patched and loaded by plain Transformers is taken back to what its record says it was.

    Returns:
        `nn.Module`: the model itself.

    Raises:
        RopeScalingError: the model is not patched.
    """
    checkpoint = read_checkpoint(model)
    if checkpoint.record is None:
        raise RopeScalingError("This model is not patched: there is nothing to revert.")
    settings = checkpoint.settings
    _take_off(model)
    if any(hasattr(config, RECORD_KEY) for config in checkpoint.configs):
        load_settings(model, checkpoint.slots, settings)
    return model


def _take_off(model: nn.Module) -> None:
    slots = rotary_slots(model)
    if (applied := applied_patch(slots)) is not None:
        applied.revert(model)
    else:
        detach(model, slots)


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
    config = config_state(slots[0].config)
    patch(model, *method, **arguments)
    try:
        yield model
    finally:
        _take_off(model)
        if before is not None:
            replace(before, config_values=config).apply(model)


def patched_in_attention(model: nn.Module) -> bool:
    """Whether a patch in effect decides what attention computes: a span method or a temperature."""
    applied = applied_patch(rotary_slots(model))
    return applied is not None and bool(applied.programs)
