"""What one layer's attention has to compute in one call: rows that share positions, their spans, and the turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rope_scaling.attention.rotary import RotaryLayout, Rotation
from rope_scaling.spans import Span


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
    key_positions: torch.Tensor
    """The same for every key, `[S]`."""
    offset: int = 0
    """What the model added to these positions when it turned queries and keys."""

    def bounds(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key that every query sees under a span, as indices into `keys`, `[T]` each."""
        first, last = span.first(self.positions), span.last(self.positions)
        begin = int(self.key_positions[0])
        if int(self.key_positions[-1]) - begin + 1 == len(self.key_positions):
            return (first - begin).clamp(min=0), (last - begin).clamp(max=len(self.key_positions) - 1)
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
    memo: dict[object, Any] = field(default_factory=dict)

    def query_rotation(self, segment: Segment, span: Span) -> Rotation | None:
        """From the angles that the queries of a segment have to those of a span, its amplitude included."""
        key = ("query", id(segment), id(span.query), id(span.amplitude))
        if key not in self.memo:
            self.memo[key] = self._rotation(span.query, segment.positions, segment.offset, span.amplitude)
        return self.memo[key]

    def key_rotation(self, segment: Segment, span: Span, begin: int = 0, end: int | None = None) -> Rotation | None:
        """The same for the keys `begin .. end - 1` of a segment."""
        key = ("key", id(segment), id(span.key), begin, end)
        if key not in self.memo:
            positions = segment.key_positions[begin:end]
            self.memo[key] = self._rotation(span.key, positions, segment.offset, None)
        return self.memo[key]

    def step(self, segment: Segment, before: Span, span: Span, of_query: bool) -> Rotation | None:
        """From the angles of an earlier span to those of one that differs from it in a few pairs."""
        key = ("step", of_query, id(segment), id(before.query), id(span.query), id(before.key), id(span.amplitude))
        if key not in self.memo:
            one, other = (before.query, span.query) if of_query else (before.key, span.key)
            positions = segment.positions if of_query else segment.key_positions
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
        gain = self.temperature(segment.positions)
        return None if bool((gain == 1).all()) else gain

    def _rotation(
        self,
        angles: Callable[[torch.Tensor], torch.Tensor] | None,
        positions: torch.Tensor,
        offset: int,
        amplitude: torch.Tensor | None,
    ) -> Rotation | None:
        def difference(begin: int, end: int) -> torch.Tensor:
            its = positions[begin:end]
            if not self.turned:
                return its.double()[:, None] * self.inv_freq.double() if angles is None else angles(its)
            # What the model did is taken off in float64.
            return self._angles(angles, its, offset) - self._angles(None, its, offset)

        return Rotation.made(difference, len(positions), amplitude)

    def _angles(
        self, angles: Callable[[torch.Tensor], torch.Tensor] | None, positions: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """The angles of a span, `[T, R / 2]`; of pairs that it leaves to the model those of the model to the bit."""
        # The model multiplies in float32 and rounds.
        host = ((positions + offset).float()[:, None] * self.inv_freq).double()
        if angles is None:
            return host
        wanted, per_token = angles(positions), self.inv_freq.double()
        # Only differences of angles count, so the offset goes to both sides.
        return torch.where(wanted == positions.double()[:, None] * per_token, host, wanted + offset * per_token)


def turn(x: torch.Tensor, rotation: Rotation | None, layout: RotaryLayout, in_place: bool = False) -> torch.Tensor:
    """`x` turned, or itself where there is nothing to turn."""
    return x if rotation is None else rotation.to(x.device).apply(x, layout, in_place)
