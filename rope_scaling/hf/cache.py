"""What the engine keeps beside a cache: layers that forget what no query will see, and keys already rotated."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from rope_scaling.attention.fused import rotate
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.sequences import KeyPositions, KeyStore, Segment
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.layer_spans import level_of_the_caller
from rope_scaling.spans import Span


_SLACK = 64
"""Tokens kept beyond the window, so that assisted decoding can take back what it guessed."""


@cache
def _warn_of_memory(device: str) -> None:
    """Says once a process and device that there is no memory for rotated keys."""
    warnings.warn(
        f"No memory to keep rotated keys beside the cache on {device}: every token rotates them again, which is "
        "slower. Free memory, or use a method that keeps none, such as 'sliding_window' or a frequency method.",
        stacklevel=level_of_the_caller(),
    )


class RetainedLayer(DynamicLayer):
    """A cache layer that keeps the first and the last tokens only; attention still gets every key of its own call."""

    is_croppable = True

    def __init__(self, head: int, window: int):
        super().__init__()
        self.head = head
        self.window = window
        self.seen = 0
        self._left = 0
        """Keys held since the last call."""

    @property
    def store(self) -> KeyStore:
        """Which slots are held.

        Raises:
            RopeScalingError: keys were removed by other code, so which ones is not known.
        """
        if self._held != self._left:
            raise RopeScalingError(
                f"Other code removed keys from this cache: a layer holds {self._held}, and its last call left "
                f"{self._left}. Start from an empty cache."
            )
        return KeyStore(head=self.head, gap=self.seen - self._held)

    @property
    def _held(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None and self.keys.numel() else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends, returns all that was held and is new, and then forgets the middle."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        room = self.head + self.window + _SLACK
        # Half a window of further tokens is let in first: forgetting copies what stays.
        if keys.shape[-2] > room + self.window // 2:
            self.keys, self.values = (
                torch.cat([held[..., : self.head, :], held[..., self.head - room :, :]], dim=-2)
                for held in (keys, values)
            )
        self._left = self._held
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that attention will get, and 0: what is missing lies in the middle."""
        return self._held + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens (given as a negative number), as far as their window is still there.

        Raises:
            RopeScalingError: more tokens than are kept beyond the window.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count <= 0 or not self.is_initialized:
            return
        if self.store.gap and self._held - self.head - count < self.window:
            raise RopeScalingError(
                f"The cache of this windowed model stores the last {self.window} tokens and {_SLACK} more, so {count} "
                "cannot be taken back. Start from an empty cache, or crop less."
            )
        super().crop(-count)
        self.seen -= count
        self._left = self._held

    def reset(self) -> None:
        """Empties the layer; older versions of Transformers only overwrite what a growing one holds with zeros."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self._left = 0


def retain(cache: DynamicCache, bounds: list[tuple[int, int] | None]) -> None:
    """Gives an empty cache layers that forget, where `bounds` (first and last tokens to keep) say that is enough."""
    if not cache.layers:
        cache.layers.extend(DynamicLayer() for _ in bounds)
    for index, bound in enumerate(bounds[: len(cache.layers)]):
        if bound is not None and type(cache.layers[index]) is DynamicLayer:
            cache.layers[index] = RetainedLayer(*bound)


def can_retain(cache: Any) -> bool:
    """Whether a cache is empty, grows, and lies in one place."""
    return type(cache) is DynamicCache and not cache.get_seq_length() and not getattr(cache, "offloading", False)


class RotatedKeyCache:
    """Re-rotated keys of one cache layer, stored so that each key is rotated to a span's angle only once.

    A key's angle in a span is fixed, so what was rotated stays right while tokens are appended. Anything else that is
    done to the cache (reordering beams, cropping, resetting, selecting rows) puts other tensors into it or changes its
    length; then everything is rotated again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], _Buffer] = {}
        self._used: set[tuple[Any, ...]] = set()
        self._keys: weakref.ref[torch.Tensor] | None = None
        self._state: tuple[int, int | None] = (0, None)

    def begin(self, layer: Any, past: int) -> None:
        """Before a call on `past` cached tokens: forgets everything unless the cache is as the last call left it."""
        keys: Any = getattr(layer, "keys", None)
        same = keys is not None and self._keys is not None and self._keys() is keys
        if not same or (past, _version(keys)) != self._state:
            self._buffers = {}
        # Only `end` vouches for the cache again: a call too long to keep rotated keys does not get there.
        self._used, self._keys = set(), None

    def end(self, layer: Any, length: int) -> None:
        """After a call: remembers how it left the cache, and drops what it did not use."""
        self._keys, self._state = weakref.ref(layer.keys), (length, _version(layer.keys))
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in self._used}

    def rotated(self, plan: Plan, segment: Segment, span: Span, key: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A segment's keys at the angles of a span: those that the queries of this call see there, and no others.

        Returns:
            `tuple`: `[rows, Hk, S, d]`, and the index among the segment's keys of the first of them.
        """
        begin, end, is_seen = plan.key_range(segment, span)
        positions = segment.key_positions
        assert isinstance(positions, KeyPositions)  # the decoder hook refuses others on top of a cache
        # Where a key lies must not have moved (the model's own windows and layers that forget shift keys), nor the
        # rows that are computed together, nor how the model rotated them.
        where = segment.rows.start, segment.rows.stop, segment.offset, positions.first, positions.gap
        name = (span.key, key.dtype, key.device, *where)
        kept = self._buffers.get(name)
        if kept is None or not kept.begin <= begin <= kept.end:
            kept = _Buffer(key[:, :, :0], begin, begin)
        try:
            kept.make_room(key, begin, end)
        except torch.OutOfMemoryError:
            return self._without_buffer(plan, segment, span, key, begin, end)
        if kept.end < end:
            rotation = plan.key_rotation(segment, span, kept.end, end)
            kept.append(rotate(key[:, :, kept.end : end], rotation, plan.layout))
        if is_seen:
            # The last query sees keys there, and so may the next.
            self._buffers[name] = kept
            self._used.add(name)
        return kept.keys, kept.begin

    def _without_buffer(
        self, plan: Plan, segment: Segment, span: Span, key: torch.Tensor, begin: int, end: int
    ) -> tuple[torch.Tensor, int]:
        """The same for one call, where there is no memory to keep rotated keys in: slower, and said once."""
        self._buffers, self._used = {}, set()
        _warn_of_memory(str(key.device))
        return rotate(key[:, :, begin:end], plan.key_rotation(segment, span, begin, end), plan.layout), begin

    @property
    def elements(self) -> int:
        """Numbers held."""
        return sum(buffer.tensor.numel() for buffer in self._buffers.values())


@dataclass
class _Buffer:
    """Rotated keys `begin .. end - 1` at the start of a tensor with room for more."""

    tensor: torch.Tensor
    begin: int
    end: int

    @property
    def keys(self) -> torch.Tensor:
        return self.tensor[:, :, : self.end - self.begin]

    def append(self, keys: torch.Tensor) -> None:
        held = self.end - self.begin
        self.tensor[:, :, held : held + keys.shape[2]] = keys
        self.end += keys.shape[2]

    def make_room(self, like: torch.Tensor, begin: int, end: int) -> None:
        """For keys up to `end`; those before `begin` are let go of when there is too little."""
        if end - self.begin <= self.tensor.shape[2]:
            return
        stays = self.keys[:, :, begin - self.begin :]
        needed = end - begin
        bigger = like.new_empty(*like.shape[:2], needed + needed // 8 + 8, like.shape[3])
        bigger[:, :, : stays.shape[2]] = stays
        self.tensor, self.begin = bigger, begin


_ROTATED: weakref.WeakKeyDictionary[Any, tuple[Any, RotatedKeyCache]] = weakref.WeakKeyDictionary()


def rotated_keys_of(layer: Any, owner: Any) -> RotatedKeyCache:
    """The rotated keys of a cache layer under one patch."""
    if layer not in _ROTATED or _ROTATED[layer][0]() is not owner:
        _ROTATED[layer] = weakref.ref(owner), RotatedKeyCache()
    return _ROTATED[layer][1]


def rotated_copies(cache: Any) -> float:
    """How much is kept rotated beside a cache, in copies of its keys."""
    kept = sum(_ROTATED[layer][1].elements for layer in cache.layers if layer in _ROTATED)
    return kept / sum(layer.keys.numel() for layer in cache.layers)


def key_store(layer: Any, cache: Any, length: int, index: int, needed: tuple[int, int] | None) -> KeyStore:
    """Which slots the key tensor of a layer will hold in a call of `length` tokens.

    Raises:
        RopeScalingError: the layer has forgotten keys that the patch in effect (`needed` first and last ones; all
            for `None`) would see.
    """
    if isinstance(layer, RetainedLayer):
        if layer.store.gap and (needed is None or needed[0] > layer.head or needed[1] > layer.window):
            raise RopeScalingError(
                f"This cache was filled under another patch and holds the first {layer.head} and the last "
                f"{layer.window} of {layer.seen} tokens only, fewer than the patch in effect sees. Start from an "
                "empty cache."
            )
        return layer.store
    return KeyStore(offset=int(cache.get_mask_sizes(length, index)[1]))


_LEFT: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
"""The keys of every cache layer as the last call under a span method left them."""


def remember_keys(layer: Any) -> None:
    """After attention of a layer: what its cache holds now."""
    if type(layer) is DynamicLayer and layer.keys is not None:
        _LEFT[layer] = layer.keys


def check_keys(layer: Any) -> None:
    """Before a call: refuses a cache from which keys were removed other than from its end.

    A span method needs the position of every key, and a cache does not hold them.

    Raises:
        RopeScalingError: the layer holds fewer keys than the last call left, and not the first of them.
    """
    left = _LEFT.pop(layer, None)
    keys: Any = getattr(layer, "keys", None)
    if left is None or keys is None or keys is left or keys.ndim != left.ndim or keys.shape[-2] >= left.shape[-2]:
        return
    if keys.data_ptr() == left.data_ptr() and keys.stride() == left.stride():
        return  # cropped: a view of the same memory
    first = left[..., : keys.shape[-2], :].to(keys.device)
    if not all(any(torch.equal(row, one) for one in first) for row in keys):
        raise RopeScalingError(
            f"Keys were removed from the middle of this cache: a layer holds {keys.shape[-2]} of the "
            f"{left.shape[-2]} keys of the last call, and not the first ones, so their positions are not known. Span "
            "methods need them; compress caches of models that are patched with a frequency method, or let "
            "`sliding_window`, `streaming` or `lm_infinite` forget keys."
        )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
