"""The span: one interval of keys a query sees, and the angles to which both are rotated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.devices import constant_on
from rope_scaling.errors import RopeScalingError
from rope_scaling.geometry import RopeGeometry
from rope_scaling.notation import MethodBase


Bound = Callable[[torch.Tensor], torch.Tensor]
"""From query positions `[T]` (int64) to key positions `[T]` (int64)."""
Angles = Callable[[torch.Tensor], torch.Tensor]
"""From positions `[T]` (int64) to the angle of every pair in radians, `[T, R / 2]` (float64)."""


@dataclass(frozen=True, eq=False)
class Span:
    """One interval of keys for every query, and the angles at which query and key meet there.

    Query `m` sees the keys at positions `first(m) .. last(m)`, both included; an interval with `first(m) > last(m)` is
    empty. Neither end may decrease with `m`, and the spans of one method must not overlap: a key that no span covers
    is not seen. The score is that of the query rotated to `query(m)` and the key rotated to `key(n)`.
    """

    first: Bound
    last: Bound
    query: Angles | None = None
    """Angles of the query; `None` for those of the model, its position times its frequencies."""
    key: Angles | None = None
    """Angles of the key; `None` for those of the model."""
    amplitude: torch.Tensor | None = None
    """What every pair's part of the score is multiplied with, `[R / 2]`; 0 takes a pair out. `None` for 1."""
    after: Span | None = None
    """An earlier span of the list with these angles but for a few pairs; the engine then rotates those pairs alone."""


@dataclass(frozen=True, eq=False)
class Rope:
    """What a method knows of one layer's rotary embedding when it makes its spans."""

    geometry: RopeGeometry
    inv_freq: torch.Tensor
    """Frequencies in effect, in radians a token, `[R / 2]`, float64."""
    trained_length: int
    """Tokens that the model reads with these frequencies, `L0`."""
    target_length: int | None = None
    """Tokens that it is to read, if that was said."""
    attention_factor: float = 1.0
    """Multiplier of cos and sin in effect."""
    scaled: Callable[..., tuple[torch.Tensor, float]] | None = None
    """Frequencies (float64) and attention factor under a frequency method; for a model loaded scaled, on top."""
    num_layers: int | None = None

    def positions(self, position_map: Callable[[torch.Tensor], torch.Tensor]) -> Angles:
        """Angles of positions that were mapped to others, which may be fractions."""
        return lambda positions: (
            position_map(positions).double()[:, None] * constant_on(self.inv_freq, positions.device)
        )


@dataclass(frozen=True, kw_only=True)
class SpanMethod(MethodBase, ABC):
    """Changes which keys a query sees or at which angle. A method of your own needs `spans` and no more."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    """Where the method comes from, as a link."""
    changes: ClassVar[str] = "a method of the user's own"
    """What it does, in a few words."""
    needs_training: ClassVar[str] = "no"
    decides: ClassVar[frozenset[str]] = frozenset({"map"})
    """What two methods of one patch cannot both decide: `frequency`, `map` (distances) or `window` (keys seen)."""

    @abstractmethod
    def spans(self, rope: Rope) -> list[Span]:
        """The spans of one layer.

        Args:
            rope (`Rope`): The layer's rotary embedding.

        Raises:
            RopeScalingError: the method cannot be used with this model.
        """

    def layer_spans(self, rope: Rope, layer: int) -> list[Span]:
        """The spans of a layer, for methods that treat layers differently."""
        return self.spans(rope)

    def layer_kind(self, rope: Rope, layer: int) -> str:
        """A name that layers with the same spans share."""
        return ""

    def reach(self, rope: Rope) -> int | None:
        """The longest text in tokens whose distances the model was trained on; `None` for any length."""
        return None

    def retained(self, rope: Rope) -> tuple[int, int] | None:
        """How many first and how many last keys suffice for every query; `None` if all may be needed."""
        return None

    def layer_retained(self, rope: Rope, layer: int) -> tuple[int, int] | None:
        """The same for one layer."""
        return self.retained(rope)


def causal(positions: torch.Tensor) -> torch.Tensor:
    """The last key a query may see: itself."""
    return positions


def beginning(positions: torch.Tensor) -> torch.Tensor:
    """The first key there is."""
    return torch.zeros_like(positions)


def within(window: int) -> Span:
    """The last `window` keys, the query's own included, rotated as the model rotates them."""
    return Span(first=lambda m: (m - window + 1).clamp(min=0), last=causal)


def same_chunk(size: int) -> Span:
    """The keys of the query's own chunk of `size` tokens, rotated as the model rotates them."""
    return Span(first=lambda m: m - m % size, last=causal)


def beyond(
    window: int, query: Angles | None = None, key: Angles | None = None, amplitude: torch.Tensor | None = None
) -> Span:
    """Every key at a distance of `window` or more."""
    return Span(first=beginning, last=lambda m: m - window, query=query, key=key, amplitude=amplitude)


def compose(spans: list[Span], windows: list[Span]) -> list[Span]:
    """Intersects every span with every interval of a window; angles come from whichever of the two sets them."""
    return [_intersect(span, window) for span in spans for window in windows]


def _intersect(one: Span, other: Span) -> Span:
    return Span(
        first=lambda m: torch.maximum(one.first(m), other.first(m)),
        last=lambda m: torch.minimum(one.last(m), other.last(m)),
        query=one.query or other.query,
        key=one.key or other.key,
        amplitude=other.amplitude if one.amplitude is None else one.amplitude,
        after=one.after or other.after,
    )


def plain() -> list[Span]:
    """Causal attention as the model has it."""
    return [Span(first=beginning, last=causal)]


def check_spans(spans: list[Span], name: str, rope: Rope) -> None:
    """Tries a method's spans on positions around every length that matters, and refuses what the engine cannot run.

    Raises:
        RopeScalingError: ends that decrease, look ahead or have the wrong shape, spans that overlap, a query that sees
            nothing, or angles of the wrong shape.
    """
    who = f"The spans of {name or 'this method'}"
    if not spans or not all(isinstance(span, Span) for span in spans):
        raise RopeScalingError(f"{who} must be a list of one or more `Span`; got {spans!r}.")
    length = 2 * max(rope.target_length or 0, 2 * rope.trained_length)
    step = max(length // 4096, 1)
    for start in (0, step // 2):
        _check_on(spans, who, torch.arange(start, length, step), rope)
    for around in {rope.trained_length, rope.trained_length // 2, rope.target_length or 0, 0}:
        low = max(around - 256, 0)
        _check_on(spans, who, torch.arange(low, low + 512), rope)


def _check_on(spans: list[Span], who: str, positions: torch.Tensor, rope: Rope) -> None:
    seen = torch.zeros(len(positions), dtype=torch.bool)
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, span in enumerate(spans):
        first, last = (torch.as_tensor(end(positions)) for end in (span.first, span.last))
        if first.shape != positions.shape or last.shape != positions.shape or first.is_floating_point():
            raise RopeScalingError(
                f"{who}: `first` and `last` of span {index} must give one whole position for each of the "
                f"{len(positions)} queries; got shapes {tuple(first.shape)} and {tuple(last.shape)}, {first.dtype}."
            )
        there = first.clamp(min=0) <= last
        if (ahead := there & (last > positions)).any():
            at = int(ahead.int().argmax())
            raise RopeScalingError(
                f"{who}: span {index} looks ahead of the query: query {int(positions[at])} would see key "
                f"{int(last[at])}. `last` must be at most the query's own position."
            )
        for end, values in (("first", first), ("last", last)):
            if (values[there].diff() < 0).any():
                at = int(positions[there][int((values[there].diff() < 0).int().argmax()) + 1])
                raise RopeScalingError(
                    f"{who}: `{end}` of span {index} decreases at query {at}. Neither end may decrease with the query."
                )
        for other, (its_first, its_last) in enumerate(taken):
            both = (torch.maximum(first, its_first).clamp(min=0) <= torch.minimum(last, its_last)) & there
            if both.any():
                at = int(positions[int(both.int().argmax())])
                raise RopeScalingError(
                    f"{who}: spans {other} and {index} overlap at query {at}, so a key there would count twice. "
                    "Their intervals must be disjoint."
                )
        taken.append((torch.where(there, first, 1), torch.where(there, last, 0)))
        seen |= there
        _check_angles(span, f"{who}: span {index}", positions[:2], rope)
    if not seen.all():
        at = int(positions[int((~seen).int().argmax())])
        raise RopeScalingError(f"{who}: query {at} sees no key at all. Every query must see at least its own.")


def _check_angles(span: Span, who: str, positions: torch.Tensor, rope: Rope) -> None:
    pairs = len(rope.inv_freq)
    for name, angles in (("query", span.query), ("key", span.key)):
        if angles is not None and angles(positions).shape != (len(positions), pairs):
            raise RopeScalingError(
                f"{who}: `{name}` must give an angle for each of the {pairs} pairs, shape {(len(positions), pairs)}; "
                f"got {tuple(angles(positions).shape)}."
            )
    if span.amplitude is not None and span.amplitude.shape != (pairs,):
        raise RopeScalingError(
            f"{who}: `amplitude` must have one number for each of the {pairs} pairs; got shape "
            f"{tuple(span.amplitude.shape)}."
        )
