"""One set of rotary frequencies in a loaded model, and the only way in which this library changes it.

A patched module stays the same object with the same name of class. Its class becomes a subclass that keeps the patched
frequencies in float32 through `.to()`, `.half()` and `to_empty()`, and that hands them out where Transformers
initialises rotary modules again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.overlay import Overlay, lay_over, take_off
from rope_scaling.hf.rope_types import with_static_base


SlotKey: TypeAlias = tuple[str, str | None]
"""Name of a rotary module within its model, and layer type."""
STATE = "_rope_scaling"
"""The attribute of a rotary module that holds the state of a patch; there is no other."""


@dataclass(frozen=True)
class Slot:
    """One set of frequencies: a rotary module, or one layer type of a module that serves several."""

    path: str
    """Name of the module within the model."""
    module: Any
    """The rotary module."""
    layer_type: str | None
    decoder: str = ""
    """Name of the decoder whose layers it rotates: the nearest model around the module."""

    @property
    def key(self) -> SlotKey:
        """Name of the module and layer type, which tell it from all others of a model."""
        return self.path, self.layer_type

    @property
    def config(self) -> Any:
        """The config that the module was built from."""
        return self.module.config

    @property
    def in_config(self) -> bool:
        """Whether Transformers, when it builds the module again, takes its frequencies from a checkpoint."""
        return True

    def part_of(self, values: Any) -> Any:
        """This slot's part of something kept by layer type, such as `config.rope_parameters`."""
        return values[self.layer_type] if self.layer_type else values

    def with_part(self, values: Any, part: Any) -> Any:
        """The same thing with this slot's part replaced."""
        return {**values, self.layer_type: part} if self.layer_type else part

    @property
    def buffer_names(self) -> tuple[str, str]:
        """Names of the buffers that hold the frequencies in use and their pretrained copy."""
        prefix = f"{self.layer_type}_" if self.layer_type else ""
        return f"{prefix}inv_freq", f"{prefix}original_inv_freq"

    @property
    def inv_freq(self) -> torch.Tensor:
        """The frequencies in use, `[R / 2]`, as the module holds them."""
        return getattr(self.module, self.buffer_names[0])

    @property
    def attention_factor(self) -> float:
        """The multiplier of cos and sin in use."""
        return float(getattr(self.module, self._attention_name))

    @property
    def rope_type(self) -> str:
        """Transformers' type in use; `default` in a patched module, which has its frequencies from us."""
        return self.part_of(self.module.rope_type)

    @property
    def _attention_name(self) -> str:
        return f"{self.layer_type}_attention_scaling" if self.layer_type else "attention_scaling"

    def default_frequencies(self, config: Any, **arguments: Any) -> tuple[torch.Tensor, float]:
        """Unscaled frequencies by the module class's own function, past any that a patch put in front of it.

        Raises:
            RopeScalingError: the class has none, so its frequencies cannot be computed from a config.
        """
        name = "compute_default_rope_parameters"
        functions = [vars(cls)[name] for cls in type(self.module).__mro__ if name in vars(cls)]
        if not functions:
            raise RopeScalingError(
                f"{type(self.module).__name__} has no `{name}`, so its frequencies cannot be read from its config."
            )
        return getattr(functions[-1], "__func__", functions[-1])(config, **arguments)

    def ends_at(self, length: int) -> bool:
        """Whether the module can compute no angles beyond this length, in tokens."""
        return False

    def set(self, inv_freq: torch.Tensor, attention_factor: float, length: int) -> None:
        """Puts frequencies for texts of `length` tokens into the module, remembering what it held before."""
        state = _state(self.module)
        for name in self.buffer_names:
            if name not in self.module._buffers:
                continue
            state.saved_buffers.setdefault(name, self.module._buffers[name])
            state.pinned[name] = inv_freq.detach().to("cpu", torch.float32)
        remember(self.module, self._attention_name, "rope_type")
        setattr(self.module, self._attention_name, attention_factor)
        if callable(getattr(self.module, "rope_init_fn", None)):  # some compute their frequencies again in every call
            remember(self.module, "rope_init_fn")
            self.module.rope_init_fn = self.module.compute_default_rope_parameters
        self.module.rope_type = self.with_part(self.module.rope_type, "default")
        _restore_pinned(self.module)

    def holds(self, inv_freq: torch.Tensor, attention_factor: float) -> bool:
        """Whether the module, read back, holds exactly these."""
        in_use = self.inv_freq.cpu()
        same = in_use.dtype == torch.float32 and torch.equal(in_use, inv_freq)
        # Under any other type Transformers computes frequencies again in a call.
        return same and self.attention_factor == attention_factor and self.rope_type == "default"

    def in_use(self) -> tuple[Any, ...]:
        """What holds the frequencies, for telling by identity whether anything was put in its place since."""
        buffers = [self.module._buffers.get(name) for name in self.buffer_names]
        versions = [None if buffer is None or buffer.is_inference() else buffer._version for buffer in buffers]
        return *buffers, *versions, getattr(self.module, self._attention_name, None), self.module.rope_type

    def load(self, inv_freq: torch.Tensor, attention_factor: float, rope_parameters: dict[str, Any]) -> None:
        """Gives an unpatched module frequencies as Transformers would when it builds it from `rope_parameters`."""
        for name in self.buffer_names:
            if name in self.module._buffers:
                self.module._buffers[name] = inv_freq.to(self.inv_freq.device, copy=True)
        setattr(self.module, self._attention_name, attention_factor)
        own = with_static_base(self.part_of(rope_parameters), self.config)["rope_type"]
        self.module.rope_type = self.with_part(self.module.rope_type, own)


@dataclass
class PatchState:
    """What a patched module must know: its float32 frequencies on the CPU, what to go back to, and the whole patch."""

    pinned: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name of the buffer, `[R / 2]` each."""
    saved_buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    saved_attributes: dict[str, Any] = field(default_factory=dict)
    patch: Any = None
    """The `Patch` that was applied to the model."""
    config_before: dict[str, Any] = field(default_factory=dict)
    """Attributes of the config before the patch; those it did not have are absent."""
    path: str = ""
    """Name of the module in the model that was patched; wrappers that come later change it."""
    decoder: str = ""
    """Name of its decoder there."""


def configs_of(slots: Iterable[Slot]) -> list[Any]:
    """The configs that rotary modules were built from."""
    return list({id(slot.config): slot.config for slot in slots}.values())


def decoder_around(model: nn.Module, path: str) -> str:
    """The nearest model around a rotary module: in most families its parent, in some a layer's attention holds it."""
    parent = path.rpartition(".")[0]
    around = parent
    while around and not hasattr(model.get_submodule(around), "set_attn_implementation"):
        around = around.rpartition(".")[0]
    return around if hasattr(model.get_submodule(around), "set_attn_implementation") else parent


def patch_state(slot: Slot) -> PatchState | None:
    """The state of a slot's module, or `None` if it is not patched."""
    state = slot.module.__dict__.get(STATE)
    return state if state is not None and state.patch is not None else None


def set_patch_state(slot: Slot, patch: Any, config_before: dict[str, Any]) -> None:
    """Leaves the patch of a whole model in one of its modules, for `patch_state` to find."""
    state = _state(slot.module)
    state.patch, state.config_before, state.path, state.decoder = patch, config_before, slot.path, slot.decoder


def remember(module: Any, *names: str) -> None:
    """Keeps attributes of a module as they are before the first change, for `restore`."""
    saved = _state(module).saved_attributes
    for name in names:
        saved.setdefault(name, getattr(module, name))


def is_pinned(module: nn.Module) -> bool:
    """Whether a module is a patched one."""
    return isinstance(module, _Pinned) and STATE in module.__dict__


def restore(module: Any) -> None:
    """Puts a module back to what it was before the first `Slot.set`: class, buffers, attributes."""
    state = module.__dict__.pop(STATE, None)
    if state is None:
        return
    take_off(module, _Pinned)
    for name, value in state.saved_buffers.items():
        module._buffers[name] = value.to(module._buffers[name].device)
    for name, value in state.saved_attributes.items():
        moved = isinstance(value, nn.Parameter) and value.device != getattr(module, name).device
        setattr(module, name, nn.Parameter(value.to(getattr(module, name).device), False) if moved else value)


class _Pinned(Overlay):
    """Keeps a rotary module's patched frequencies in float32 whatever is done to the model around it."""

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[misc]
        _restore_pinned(self)  # type: ignore[arg-type]
        return self

    def compute_default_rope_parameters(self, config=None, device=None, seq_len=None, layer_type=None):  # type: ignore[no-untyped-def]
        """The patched frequencies, in the place where Transformers looks for the default ones."""
        name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        pinned = getattr(self, STATE).pinned
        if name not in pinned:
            return super().compute_default_rope_parameters(config, layer_type=layer_type)  # type: ignore[misc]
        factor = getattr(self, f"{layer_type}_attention_scaling" if layer_type else "attention_scaling")
        return pinned[name].to(device), factor


def _state(module: nn.Module) -> PatchState:
    if STATE not in module.__dict__:
        module.__dict__[STATE] = PatchState()
        lay_over(module, _Pinned)
    return module.__dict__[STATE]


def _restore_pinned(module: nn.Module) -> None:
    for name, value in getattr(module, STATE).pinned.items():
        device = module._buffers[name].device  # type: ignore[union-attr]
        module._buffers[name] = value.to(device, copy=True)
