"""A patch's methods worked out for every layer of one model: its spans, and what layers that attend alike share."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.spans import Rope, Span, SpanMethod, compose, plain
from rope_scaling.spans.base import check_spans, same_chunk, within
from rope_scaling.temperatures import Temperature


PROGRAMS: WeakValueDictionary[int, SpanProgram] = WeakValueDictionary()
"""All that there are, by number, for graphs that cannot hold them."""
_NUMBERS = count()
_INSIDE = {"rope_scaling", "transformers", "torch", "accelerate", "peft"}


@dataclass(frozen=True)
class Layer:
    """What a patch has to know of one decoder layer."""

    rope: Rope | None
    """`None` for a layer that rotates nothing."""
    layout: RotaryLayout
    scaled: bool
    """Whether the patch is for this layer; others keep their attention."""
    sliding_window: int | None
    """The model's own window."""
    chunk: int | None = None
    """Tokens of the model's own chunks, beyond which no query looks."""
    attends: bool = True
    """Whether it has attention at all; a recurrent layer has not."""


@dataclass(frozen=True, eq=False)
class Kind:
    """What layers that attend alike share."""

    spans: list[Span]
    inv_freq: torch.Tensor
    layout: RotaryLayout
    temperature: Any
    retained: tuple[int, int] | None


class SpanProgram:
    """A patch's methods, worked out for every layer of one model."""

    def __init__(self, methods: tuple[SpanMethod, ...], temperature: Temperature | None, layers: list[Layer]):
        self.methods, self.temperature, self.layers = methods, temperature, layers
        self.without_attention = {index for index, layer in enumerate(layers) if not layer.attends}
        self.reach = self._reach()
        self._warned: set[str] = set()
        self.kernels: dict[str, str] = {}
        """What computed attention on a GPU so far, by the device's name."""
        self._work_out()

    def __getstate__(self) -> dict[str, Any]:
        # Spans hold functions; they are made again from the methods.
        return {name: value for name, value in vars(self).items() if name not in ("kinds", "kind_of")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._work_out()

    def __deepcopy__(self, memo: dict[int, Any]) -> SpanProgram:
        return self  # nothing in it changes, and copies of a model carry the same patch

    def _work_out(self) -> None:
        self.number = next(_NUMBERS)
        PROGRAMS[self.number] = self
        self.kinds: dict[Hashable, Kind] = {}
        self.kind_of: list[Hashable] = []
        for index, layer in enumerate(self.layers):
            own = tuple(method.layer_kind(layer.rope, index) for method in self.methods) if layer.rope else ()
            name = (id(layer.rope), layer.scaled, layer.sliding_window, layer.chunk, own)
            if name not in self.kinds:
                self.kinds[name] = self._kind(layer, index)
            self.kind_of.append(name)

    def _kind(self, layer: Layer, index: int) -> Kind:
        """Intersects the methods with each other and with the model's own window."""
        spans, retained, rope = plain(), None, layer.rope
        inv_freq = torch.zeros(layer.layout.rotary_dim // 2) if rope is None else rope.inv_freq.float()
        if layer.scaled:
            known = rope or self._some_rope()
            for method in self.methods:
                its_spans = method.layer_spans(known, index)
                check_spans(its_spans, method.name, known)
                spans = compose(spans, its_spans)
                retained = method.layer_retained(known, index) or retained
        if rope is None:
            spans = [Span(span.first, span.last) for span in spans]
        spans = [replace(span, after=None) if _revives(span) else span for span in spans]
        if layer.sliding_window:
            spans = compose(spans, [within(layer.sliding_window)])
        if layer.chunk:
            spans = compose(spans, [same_chunk(layer.chunk)])
        temperature = _Scale(self.temperature, self._some_rope().trained_length) if self.temperature else None
        return Kind(spans, inv_freq, layer.layout, temperature if layer.scaled else None, retained)

    def _some_rope(self) -> Rope:
        return next(layer.rope for layer in self.layers if layer.rope is not None and layer.scaled)

    def _reach(self) -> int | None:
        reaches = [method.reach(self._some_rope()) for method in self.methods]
        return min((reach for reach in reaches if reach is not None), default=None)

    def warn_beyond_reach(self, longest: int) -> None:
        """Says once that a text is longer than the methods were made for."""
        if self.reach is not None and longest > self.reach and "reach" not in self._warned:
            self._warned.add("reach")
            names = ", ".join(method.name or type(method).__name__ for method in self.methods)
            warnings.warn(
                f"A text of {longest} tokens exceeds the context length of {names} with these settings, which is "
                f"{self.reach} tokens: the model meets distances it was not trained on.",
                stacklevel=level_of_the_caller(),
            )

    def note_kernels(self, device: torch.device, kernels: str) -> None:
        """Remembers for `describe`, and logs once, what computes attention on a device."""
        if str(device) not in self.kernels:
            self.kernels[str(device)] = kernels
            logging.getLogger(__name__).info("rope-scaling: attention on %s runs through %s.", device, kernels)

    def warn_of_dropout(self, dropout: float) -> None:
        """Says once that attention dropout takes the slow path."""
        if "dropout" not in self._warned:
            self._warned.add("dropout")
            warnings.warn(
                f"Attention dropout ({dropout:g}) does not go through a fused kernel under a span method or a "
                "temperature: attention is computed in blocks, several times slower. Set `attention_dropout` in the "
                "model's config to 0 to train at full speed.",
                stacklevel=level_of_the_caller(),
            )


def _revives(span: Span) -> bool:
    """Whether a span has an amplitude in a pair where the one it follows has 0: nothing can be made from that."""
    before = None if span.after is None else span.after.amplitude
    if before is None:
        return False
    now = torch.ones_like(before) if span.amplitude is None else span.amplitude
    return bool(((before == 0) & (now != 0)).any())


def level_of_the_caller() -> int:
    """`stacklevel` of the first line outside this library and those that it runs in: the user's call."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level


@dataclass(frozen=True)
class _Scale:
    """A temperature with the trained length filled in."""

    temperature: Temperature
    trained_length: int

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        return self.temperature.scale(positions, self.trained_length)
