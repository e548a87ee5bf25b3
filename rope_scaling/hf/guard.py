"""What a patched model relies on, compared before every forward call of its decoder.

Other code may change a model after it was patched: another attention implementation, another rotary module, another
config. Comparing identities costs microseconds a call, and a model that lost its patch raises an error instead of
answering without it. A cache belongs to the frequencies that its keys were rotated with, so its layers are marked.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.attention import CALL, PROBE_FACTS, Call, installed
from rope_scaling.hf.cache import check_keys, remember_keys
from rope_scaling.hf.compat import attention_implementation, caches_of
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.layer_spans import SpanProgram
from rope_scaling.hf.slot import Slot, is_pinned


_MARK = "rope_scaling_frequencies"
"""Attribute of a cache layer: the frequencies that its keys were rotated with."""
_AGAIN = (
    "Patch the model again after such a change (`rope_scaling.patch(model, ...)`), or go on without the patch after "
    "`rope_scaling.unpatch(model)`."
)


class Guard:
    """A pair of forward hooks on one decoder of a patched model.

    Args:
        model (`nn.Module`): What was patched.
        path (`str`): The decoder's name within it.
        slots (list of `Slot`): Its patched slots.
        patches (list): What `patch` did to each of them.
        program: What it put into the decoder's attention, or `None`.
        method (`str`): The patch as text, for messages.
    """

    def __init__(self, model: Any, path: str, slots: list[Slot], patches: list[Any], program: Any, method: str):
        self.method, self.program = method, program
        decoder = model.get_submodule(path)
        self.attention = attention_implementation(decoder.config) if program is not None else None
        self.frequencies = _digest(slots)
        self.changed = any(change.rescaling is not None for change in patches)
        self._slots = list(zip(slots, patches, strict=True))
        self._parents = [_parent(model, slot.path) for slot in slots]
        self._in_use: list[tuple[Any, ...]] = [slot.in_use() for slot in slots]
        self._attending = [
            module for module in decoder.modules() if hasattr(module, "layer_idx") and "config" in vars(module)
        ]
        saving = (module for module in model.modules() if hasattr(module, "save_pretrained"))
        self._holders = [module for module in saving if _records(vars(module).get("config"))]
        self._stated: list[tuple[Any, ...]] = [_stated(module) for module in self._holders]
        self._values = [copy.deepcopy(stated[1:]) for stated in self._stated]
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _layers=weakref.WeakSet())

    def before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward call.

        Raises:
            RopeScalingError: something that the patch relies on was changed, or the cache is of other frequencies.
        """
        if torch.compiler.is_compiling():
            if self.attention is not None and attention_implementation(decoder.config) != self.attention:
                raise RopeScalingError(
                    f"{self._implementation_changed(decoder, attention_implementation(decoder.config))} {_AGAIN}"
                )
            return
        if PROBE_FACTS.get() is not None:
            return  # the model is being probed, with stub attention
        for problem in self.problems(decoder):
            raise RopeScalingError(f"{problem} {_AGAIN}")
        for cache in caches_of(decoder, args, kwargs):
            self._check_cache(cache)

    def after(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a forward call: marks the layers of its cache, those that the call itself made among them.

        Raises:
            RopeScalingError: the attention of a layer did not come through the engine.
        """
        if not torch.compiler.is_compiling() and PROBE_FACTS.get() is None:
            if isinstance(call := kwargs.get(CALL), Call) and not decoder.training:
                self._check_attended(decoder, call)
            for cache in caches_of(decoder, args, kwargs, output):
                for layer in cache.layers:
                    if vars(layer).get(_MARK) != self.frequencies:
                        setattr(layer, _MARK, self.frequencies)
                    self._layers.add(layer)
                    if isinstance(self.program, SpanProgram):
                        remember_keys(layer)

    def problems(self, decoder: Any, deep: bool = False) -> Iterator[str]:
        """Everything that is no longer as the patch left it; `deep` compares values where identities are the same."""
        if self.program is not None:
            configs = {id(config := vars(module)["config"]): config for module in (decoder, *self._attending)}
            names = [attention_implementation(config) for config in configs.values()]
            if others := [name for name in names if name != self.attention]:
                yield self._implementation_changed(decoder, others[0])
            elif installed(decoder) is not self.program:
                yield f"The forward hook of {type(decoder).__name__} was removed, which disables {self.method}."
        for at, ((slot, change), (parent, name)) in enumerate(zip(self._slots, self._parents, strict=True)):
            if parent is not None and parent._modules.get(name) is not slot.module:
                yield f"The rotary module `{slot.path}` was replaced, so {self.method} is not in effect."
            elif not is_pinned(slot.module):
                yield f"The class of the rotary module `{slot.path}` was changed back, so {self.method} may get lost."
            elif not _same(in_use := slot.in_use(), self._in_use[at]) and not slot.inv_freq.is_meta:
                if not slot.holds(change.inv_freq, change.attention_factor):
                    yield (
                        f"The frequencies in `{slot.path}` were overwritten after the patch, so {self.method} is not "
                        "in effect."
                    )
                    continue
                self._in_use[at] = in_use
        for index, holder in enumerate(self._holders):
            stated = _stated(holder)
            if not deep and _same(stated, self._stated[index]):
                continue
            if stated[1:] != self._values[index]:
                yield (
                    f"The config of {type(holder).__name__} was replaced or edited after the patch and no longer "
                    f"states it, so a saved model would lose {self.method}."
                )
                continue
            self._stated[index] = stated

    def _implementation_changed(self, decoder: Any, name: str | None) -> str:
        return (
            f"The attention implementation of {type(decoder).__name__} was set to {name!r} after the patch, which "
            f"disables {self.method}."
        )

    def _check_attended(self, decoder: Any, call: Call) -> None:
        count = min(len(self.program.layers), decoder.config.num_hidden_layers)  # fewer in an early exit
        if len(call.attended) < count - len(self.program.without_attention):
            missed = min(set(range(count)) - call.attended - self.program.without_attention)
            raise RopeScalingError(
                f"The attention of layer {missed} of {type(decoder).__name__} was computed by other code: its "
                f"`forward` was replaced, so {self.method} had no effect there. {_AGAIN}"
            )

    def _check_cache(self, cache: Any) -> None:
        for layer in cache.layers:
            if isinstance(self.program, SpanProgram):
                check_keys(layer)
            mark = vars(layer).get(_MARK)
            if mark == self.frequencies:
                vars(layer).pop("update", None)
            elif _held(layer) and (mark is not None or (self.changed and not _learned_prefix())):
                raise RopeScalingError(
                    f"This cache holds keys that were rotated with other frequencies than those of {self.method}: it "
                    "was filled before the model was patched, or under another patch. Start from an empty cache."
                )

    def leave(self) -> None:
        """Makes caches that were filled under the patch refuse what is appended without it."""
        for layer in self._layers if self.changed else ():
            if _held(layer):
                layer.update = partial(_refuse, self.method)


def guard(decoder: Any, watch: Guard) -> None:
    """Puts a guard on a decoder, before its other hooks."""
    decoder.register_forward_pre_hook(_Before(watch), prepend=True, with_kwargs=True)
    # Dynamo of torch 2.11 reads an OrderedDict in the order of insertion, which `prepend` leaves as it was.
    hooks = list(decoder._forward_pre_hooks.items())
    decoder._forward_pre_hooks.clear()
    decoder._forward_pre_hooks.update(hooks)
    decoder.register_forward_hook(_After(watch), with_kwargs=True)


def guard_of(decoder: Any) -> Guard | None:
    """The guard on a decoder, if there is one."""
    return next((hook.guard for hook in decoder._forward_pre_hooks.values() if isinstance(hook, _Before)), None)


def unguard(decoder: Any) -> None:
    """Takes the guard off."""
    if (watch := guard_of(decoder)) is not None:
        watch.leave()
    for hooks in (decoder._forward_pre_hooks, decoder._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _Before | _After):
                del hooks[key]
                decoder._forward_pre_hooks_with_kwargs.pop(key, None)
                decoder._forward_hooks_with_kwargs.pop(key, None)


class _Before:
    def __init__(self, watch: Guard):
        self.guard = watch

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.guard.before(decoder, args, kwargs)


class _After(_Before):
    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # type: ignore[override]
        self.guard.after(decoder, args, kwargs, output)


def _parent(model: nn.Module, path: str) -> tuple[Any, str]:
    outer, _, name = path.rpartition(".")
    return (model.get_submodule(outer), name) if name else (None, "")


def _records(config: Any) -> bool:
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return getattr(text, RECORD_KEY, None) is not None


def _stated(holder: Any) -> tuple[Any, ...]:
    """What a module's config says of the patch, for telling by identity whether it was replaced."""
    config = vars(holder)["config"]
    text = config.get_text_config() if config.sub_configs else config
    return config, *(vars(text).get(name) for name in ("rope_parameters", RECORD_KEY))


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(a is b or (isinstance(a, int | float | str) and a == b) for a, b in zip(one, other, strict=True))


def _digest(slots: list[Slot]) -> str:
    digest = hashlib.sha256()
    for slot in slots:
        if not slot.inv_freq.is_meta:
            values = [*slot.inv_freq.double().cpu().tolist(), slot.attention_factor]
            digest.update(np.array(values, dtype="<f8").tobytes())
    return digest.hexdigest()[:16]


def _held(layer: Any) -> bool:
    """Whether a cache layer holds keys; layers of a recurrence have none."""
    return getattr(layer, "keys", None) is not None and bool(layer.get_seq_length())


def _refuse(method: str, *_: Any, **__: Any) -> Any:
    raise RopeScalingError(
        f"This cache was filled under {method}, which is no longer in effect: its keys were rotated with other "
        "frequencies. Start from an empty cache."
    )


def _learned_prefix() -> bool:
    """Whether the call comes from PEFT's prefix tuning, whose cache holds learned keys that nothing rotated."""
    peft = sys.modules.get("peft")
    frame: Any = sys._getframe(1) if peft is not None else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, peft.PeftModel):  # type: ignore[union-attr]
            return bool(caller.active_peft_config.is_prompt_learning)
        frame = frame.f_back
    return False
