"""What one layer's attention has to compute in one call: rows that share positions, their spans, and the rotations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.attention.sequences import Segment
from rope_scaling.devices import constant_on
from rope_scaling.spans import Span


@dataclass(eq=False)
class Plan:
    """Everything about a layer's attention but its tensors; shared by the layers that rotate alike."""

    spans: list[Span]
    segments: list[Segment]
    layout: RotaryLayout
    inv_freq: torch.Tensor
    """Frequencies that the model rotated queries and keys with, `[R / 2]`, float32, on the CPU."""
    temperature: Callable[[torch.Tensor], torch.Tensor] | None = None
    """From positions to what the query is multiplied with."""
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
        """First key, last key + 1 covered by spans with this span's key angles, and whether the last query's is."""
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


RotatedKeySource = Callable[[Segment, Span, torch.Tensor], tuple[torch.Tensor, int]]
"""Gives a segment's keys at the angles of a span, all that its queries see there, and the index of the first."""


def _identity(tensor: torch.Tensor | None) -> int | None:
    """A tensor as part of a key; spans keep it alive as long as the plan."""
    return None if tensor is None else id(tensor)


def apply_rotation(
    x: torch.Tensor, rotation: Rotation | None, layout: RotaryLayout, in_place: bool = False
) -> torch.Tensor:
    """`x` rotated, or itself where there is nothing to rotate."""
    return x if rotation is None else rotation.to(x.device).apply(x, layout, in_place)
