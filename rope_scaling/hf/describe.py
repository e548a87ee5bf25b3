"""What is in effect on a model, in words and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.checkpoint import Checkpoint, read_checkpoint
from rope_scaling.hf.configs import RECORD_KEY, rope_parameters_of
from rope_scaling.hf.model_patch import Patch, SlotPatch, applied_patch
from rope_scaling.hf.slot import Slot
from rope_scaling.methods import method_text


@dataclass(frozen=True)
class SlotDescription:
    """What is in effect on one rotary module, or one layer type of it; frequencies as read back from the module."""

    module: str
    layer_type: str | None
    method: str
    """The method in effect with its fields, or the scaling that the checkpoint was loaded with."""
    original_length: int
    """Trained length, in tokens."""
    reach: int
    """Context length of the checkpoint as loaded, in tokens."""
    target_length: int
    """Length that it is meant to read now, in tokens."""
    attention_factor: float
    arithmetic: str
    """How the frequencies were computed."""
    reload: str
    """How plain Transformers gets the same frequencies from a saved folder."""
    inv_freq: torch.Tensor
    """`[R / 2]`, float32."""
    pretrained_inv_freq: torch.Tensor
    """`[R / 2]`, float32."""
    kernels: str = ""
    """What has computed attention on a GPU so far, under a span method or a temperature."""

    def pair_table(self) -> str:
        """One line per pair: wavelength as trained and now in tokens, slow-down, rotations in both lengths."""
        lines = ["  pair   wavelength      now     slow-down   rotations in trained / target length"]
        for index, (old, new) in enumerate(
            zip(self.pretrained_inv_freq.tolist(), self.inv_freq.tolist(), strict=True)
        ):
            stands = abs(new) < 1e-30
            now = "stopped" if stands else f"{2 * math.pi / new:12.2f}"
            slower = "         " if stands or not old else f"x{old / new:8.4f}"
            turns = f"{self.reach * old / (2 * math.pi):10.2f} / {self.target_length * new / (2 * math.pi):.2f}"
            lines.append(f"  {index:4d} {2 * math.pi / old if old else math.inf:12.2f} {now:>12s}  {slower}  {turns}")
        return "\n".join(lines)

    def __str__(self) -> str:
        where = f"{self.module} ({self.layer_type})" if self.layer_type else self.module
        kernels = [f"  attention         {self.kernels}"] if self.kernels else []
        return "\n".join(
            [
                f"{where}: {self.method}",
                f"  length            {self.original_length} trained, {self.reach} as loaded, "
                f"{self.target_length} now",
                f"  attention factor  {self.attention_factor:.6g}",
                f"  frequencies       {len(self.inv_freq)} pairs, {self.inv_freq.dtype}, on "
                f"{self.inv_freq.device}: {self.arithmetic}",
                f"  saved             {self.reload}",
                *kernels,
            ]
        )


@dataclass(frozen=True)
class Description:
    """What `describe` found; `str()` of it is what `describe` prints."""

    model: str
    slots: tuple[SlotDescription, ...]
    untouched: tuple[str, ...]
    """Layer types that keep their pretrained frequencies beside patched ones."""

    def __str__(self) -> str:
        text = "\n".join([self.model, *map(str, self.slots)])
        return text + (f"\n  untouched         {', '.join(self.untouched)}" if self.untouched else "")

    def __repr__(self) -> str:
        return f"<Description of {self.model}: {'; '.join(slot.method for slot in self.slots)}>"


def describe(model: nn.Module, pairs: bool = False) -> Description:
    """Prints which scaling is in effect on a model, read back from its modules, and returns it.

    Args:
        model (`nn.Module`): A loaded Transformers model, patched or not, bare or wrapped.
        pairs (`bool`, *optional*, defaults to `False`): Also print the table of every rotated pair.

    Raises:
        RopeScalingError: the model has no RoPE, or its config no length.
    """
    description = read_description(model)
    print(description)
    if pairs:
        for slot in description.slots:
            print(slot.pair_table())
    return description


def read_description(model: nn.Module) -> Description:
    """Which scaling is in effect on a model, read back from its modules, as `describe` prints it.

    Args:
        model (`nn.Module`): A loaded Transformers model, patched or not, bare or wrapped.

    Raises:
        RopeScalingError: the model has no RoPE, or its config no length.
    """
    checkpoint = read_checkpoint(model)
    return description_of(checkpoint, applied_patch(checkpoint.slots))


def description_of(checkpoint: Checkpoint, patch: Patch | None) -> Description:
    """As `read_description`, of a model that was read before, under the patch that is in effect on it."""
    name = type(checkpoint.model).__name__
    if patch is None:
        return Description(name, tuple(_describe_unpatched(checkpoint, slot) for slot in checkpoint.slots), ())
    changes = {slot: patch.slots.get(slot.key) for slot in checkpoint.slots}
    described = tuple(_describe_patched(slot, change, patch) for slot, change in changes.items() if change)
    untouched = tuple(sorted({slot.layer_type for slot, change in changes.items() if not change and slot.layer_type}))
    return Description(name, described, untouched)


def _describe_patched(slot: Slot, change: SlotPatch, patch: Patch) -> SlotDescription:
    pretrained, program = change.pretrained, patch.programs.get(slot.decoder)
    reach = ""
    if program is not None and program.methods:
        reach = "; any length" if program.reach is None else f"; up to {program.reach} tokens"
    reload = f"plain Transformers reloads it, as rope_type {change.rope_parameters['rope_type']!r}"
    if program is not None or not slot.in_config:
        reload = "plain Transformers refuses it; rope_scaling.from_pretrained loads it"
    return SlotDescription(
        module=slot.path,
        layer_type=slot.layer_type,
        method=" + ".join(method_text(method) for method in patch.methods),
        original_length=pretrained.geometry.original_max_position_embeddings,
        reach=pretrained.reach,
        target_length=change.target_length,
        attention_factor=slot.attention_factor,
        arithmetic=(change.rescaling.arithmetic if change.rescaling else "as loaded") + reach,
        reload=reload,
        inv_freq=slot.inv_freq,
        pretrained_inv_freq=pretrained.inv_freq,
        kernels="; ".join(f"{kernels} on {device}" for device, kernels in getattr(program, "kernels", {}).items()),
    )


def _describe_unpatched(checkpoint: Checkpoint, slot: Slot) -> SlotDescription:
    config, pretrained = slot.config, checkpoint.rope(slot)
    record = getattr(config, RECORD_KEY, None)
    loaded = f"not patched; loaded with {method_text(pretrained.method)}" if pretrained.method else "not patched"
    if record is not None:
        names = " + ".join(method["name"] for method in record["methods"])
        loaded = f"saved with {names}; `patch(model)` makes it live"
    current = slot.part_of(rope_parameters_of(config))
    return SlotDescription(
        module=slot.path,
        layer_type=slot.layer_type,
        method=loaded,
        original_length=pretrained.geometry.original_max_position_embeddings,
        reach=pretrained.reach,
        target_length=pretrained.reach if record is None else config.max_position_embeddings,
        attention_factor=slot.attention_factor,
        arithmetic="both sets by length of the call"
        if pretrained.length_dependent
        else f"rope_type {current['rope_type']!r}",
        reload=f"plain Transformers reloads it, as rope_type {current['rope_type']!r}",
        inv_freq=slot.inv_freq,
        pretrained_inv_freq=default_inv_freq(pretrained.geometry).float(),
    )
