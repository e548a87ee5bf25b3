"""What one layer's attention has to compute in one call: rows that share positions, their spans, and the turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rope_scaling.attention.rotary import RotaryLayout, Rotation
from rope_scaling.devices import constant_on
from rope_scaling.spans import Span


@dataclass(frozen=True)
class KeyPositions:
    """The positions of a segment's keys: consecutive, but for one gap where a cache has forgotten some."""

    first: int
    count: int
    """Keys there are."""
    head: int | None = None
    """Keys before the gap; `None` for no gap."""
    gap: int = 0
    """Positions left out after the head."""

    @property
    def last(self) -> int:
        """The last position."""
        return self.first + self.count - 1 + self.gap

    def part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """Positions of the keys `begin .. end - 1`, int64, made on a device."""
        positions = torch.arange(self.first + begin, self.first + end, device=device)
        return positions if self.head is None else positions + self.gap * (positions >= self.first + self.head)

    def indices(self, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the first key at `first` or later, and of the last at `last` or earlier."""
        first, last = first - self.first, last - self.first
        if self.head is not None:
            first = torch.where(first < self.head, first, (first - self.gap).clamp(min=self.head))
            last = torch.where(last < self.head, last, (last - self.gap).clamp(min=self.head - 1))
        return first.clamp(min=0), last.clamp(max=self.count - 1)


@dataclass(frozen=True, eq=False)
class Segment:
    """One document of a batch row, or of several rows whose positions agree."""

    rows: slice
    """Rows of the batch."""
    queries: slice
    """Queries of the call."""
    keys: slice
    """Keys that these queries may see, of the tensor that attention gets."""
    positions: torch.Tensor
    """Position of every query in its document, `[T]`, int64, ascending, on the CPU."""
    key_positions: torch.Tensor | KeyPositions
    """The same for every key, `[S]`."""
    offset: int = 0
    """What the model added to these positions when it turned queries and keys."""

    def __post_init__(self) -> None:
        given = self.key_positions
        if isinstance(given, torch.Tensor) and int(given[-1]) - int(given[0]) + 1 == len(given):
            object.__setattr__(self, "key_positions", KeyPositions(int(given[0]), len(given)))

    @property
    def num_keys(self) -> int:
        """Keys there are, `S`."""
        return self.key_positions.count if isinstance(self.key_positions, KeyPositions) else len(self.key_positions)

    def query_part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """Positions of the queries `begin .. end - 1`, on a device; made there where they are consecutive."""
        part = self.positions[begin:end]
        if device.type == "cpu" or not len(part):
            return part.to(device)
        first, last = int(part[0]), int(part[-1])
        return torch.arange(first, last + 1, device=device) if last - first + 1 == len(part) else part.to(device)

    def key_part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """The same for keys."""
        keys = self.key_positions
        return keys.part(begin, end, device) if isinstance(keys, KeyPositions) else keys[begin:end].to(device)

    def bounds(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key that every query sees under a span, as indices into `keys`, `[T]` each."""
        first, last = span.first(self.positions), span.last(self.positions)
        if isinstance(self.key_positions, KeyPositions):
            return self.key_positions.indices(first, last)
        return (
            torch.searchsorted(self.key_positions, first),
            torch.searchsorted(self.key_positions, last, right=True) - 1,
        )


@dataclass(eq=False)
class Plan:
    """Everything about a layer's attention but its tensors; shared by the layers that turn alike."""

    spans: list[Span]
    segments: list[Segment]
    layout: RotaryLayout
    inv_freq: torch.Tensor
    """Frequencies that the model turned queries and keys with, `[R / 2]`, float32, on the CPU."""
    temperature: Callable[[torch.Tensor], torch.Tensor] | None = None
    """From positions to what the query is multiplied with."""
    turned: bool = True
    """Whether the model has turned queries and keys already; if not, they are turned from zero."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where rotations are computed; it must have float64."""
    tile: int | None = None
    """Queries of a tile of the CPU engine; by default what suits the spans."""
    memo: dict[object, Any] = field(default_factory=dict)

    def query_rotation(self, segment: Segment, span: Span) -> Rotation | None:
        """From the angles that the queries of a segment have to those of a span, its amplitude included."""
        key = ("query", segment, span.query, _identity(span.amplitude))
        if key not in self.memo:
            self.memo[key] = self._rotation(span.query, segment.query_part, 0, len(segment.positions), segment, span)
        return self.memo[key]

    def key_rotation(self, segment: Segment, span: Span, begin: int = 0, end: int | None = None) -> Rotation | None:
        """The same for the keys `begin .. end - 1` of a segment."""
        end = segment.num_keys if end is None else end
        key = ("key", segment, span.key, begin, end)
        if key not in self.memo:
            self.memo[key] = self._rotation(span.key, segment.key_part, begin, end, segment, None)
        return self.memo[key]

    def step(self, segment: Segment, before: Span, span: Span, of_query: bool) -> Rotation | None:
        """From the angles of an earlier span to those of one that differs from it in a few pairs."""
        key = ("step", of_query, segment, before.query, span.query, before.key, span.key, _identity(span.amplitude))
        if key not in self.memo:
            one, other = (before.query, span.query) if of_query else (before.key, span.key)
            positions = segment.positions if of_query else segment.key_part(0, segment.num_keys, self.device)
            gain = None
            if of_query and not (span.amplitude is None and before.amplitude is None):
                ones = torch.ones(len(self.inv_freq), dtype=torch.float64)
                earlier, later = (ones if x is None else x for x in (before.amplitude, span.amplitude))
                gain = torch.where(earlier == later, 1.0, later / earlier)

            def difference(begin: int, end: int) -> torch.Tensor:
                its = positions[begin:end]
                return self._angles(other, its, segment.offset) - self._angles(one, its, segment.offset)

            self.memo[key] = Rotation.made(difference, len(positions), gain)
        return self.memo[key]

    def query_gain(self, segment: Segment) -> torch.Tensor | None:
        """What the temperature multiplies every query with, `[T]`, float64; `None` for 1."""
        if self.temperature is None:
            return None
        key = ("gain", segment)
        if key not in self.memo:
            gain = self.temperature(segment.positions)
            is_one = bool((gain == 1).all())
            if not is_one and self.device.type != "cpu":
                gain = self.temperature(segment.query_part(0, len(segment.positions), self.device)).float()
            self.memo[key] = None if is_one else gain
        return self.memo[key]  # type: ignore[no-any-return]

    def key_range(self, segment: Segment, span: Span) -> tuple[int, int, bool]:
        """First key, last key + 1 that spans with this span's key angles reach, and whether the last query does."""
        key = ("range", segment, span.key)
        if key not in self.memo:
            bounds = [segment.bounds(other) for other in self.spans if other.key is span.key]
            begin = min(int(first.min()) for first, _ in bounds)
            end = max(int(last.max()) for _, last in bounds) + 1
            self.memo[key] = begin, end, any(int(first[-1]) <= int(last[-1]) for first, last in bounds)
        return self.memo[key]  # type: ignore[no-any-return]

    def _rotation(
        self,
        angles: Callable[[torch.Tensor], torch.Tensor] | None,
        part: Callable[[int, int, torch.device], torch.Tensor],
        first: int,
        last: int,
        segment: Segment,
        span: Span | None,
    ) -> Rotation | None:
        def difference(begin: int, end: int) -> torch.Tensor:
            its = part(first + begin, first + end, self.device)
            if not self.turned:
                return its.double()[:, None] * self.inv_freq.double() if angles is None else angles(its)
            # What the model did is taken off in float64.
            return self._angles(angles, its, segment.offset) - self._angles(None, its, segment.offset)

        amplitude = None if span is None else span.amplitude
        if self.device.type == "cpu":
            return Rotation.made(difference, last - first, amplitude)
        if angles is None and amplitude is None:
            return None
        return Rotation.on_device(difference, last - first, amplitude)

    def _angles(
        self, angles: Callable[[torch.Tensor], torch.Tensor] | None, positions: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """The angles of a span, `[T, R / 2]`; of pairs that it leaves to the model those of the model to the bit."""
        inv_freq = constant_on(self.inv_freq, positions.device)
        # The model multiplies in float32 and rounds.
        host = ((positions + offset).float()[:, None] * inv_freq).double()
        if angles is None:
            return host
        try:
            wanted = angles(positions)
        except RuntimeError:  # a method of the user's own with constants on the CPU
            wanted = angles(positions.cpu()).to(positions.device)
        per_token = inv_freq.double()
        # Only differences of angles count, so the offset goes to both sides.
        return torch.where(wanted == positions.double()[:, None] * per_token, host, wanted + offset * per_token)


def _identity(tensor: torch.Tensor | None) -> int | None:
    """A tensor as part of a key; spans keep it alive as long as the plan."""
    return None if tensor is None else id(tensor)


def turn(x: torch.Tensor, rotation: Rotation | None, layout: RotaryLayout, in_place: bool = False) -> torch.Tensor:
    """`x` turned, or itself where there is nothing to turn."""
    return x if rotation is None else rotation.to(x.device).apply(x, layout, in_place)
