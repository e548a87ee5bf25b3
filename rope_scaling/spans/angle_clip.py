"""Angle clip: each pair's relative angle saturates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rope_scaling.devices import constant_on
from rope_scaling.errors import RopeScalingError, check_number, check_sequence, keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, beyond, causal, within
from rope_scaling.spans.rerope import half


@dataclass(frozen=True, kw_only=True)
class AngleClip(SpanMethod):
    """Each pair's relative angle saturates: `psi_i(D) = min(D theta_i, phi_i)`.

    By default only slow pairs do: those with a wavelength beyond `saturation_length` stop rotating there, so that
    `phi_i = W theta_i`; faster pairs rotate freely and keep the order of far tokens. With `W` the trained length,
    nothing changes inside it. `max_angle` is one `phi` for all pairs, `max_angles` one for each. For `phi <= pi` and
    vectors that are aligned the score then falls with distance; for any others it need not, and beyond `pi` it does
    not.

    To our knowledge not published in this saturating form. Nearest: [ReRoPE](https://kexue.fm/archives/9708) saturates
    the distance for all pairs at once, WavePrune ([2610.06963](https://huggingface.co/papers/2610.06963)) takes a
    pair out after its first rotation.
    """

    name: ClassVar[str] = "angle_clip"
    paper: ClassVar[str] = "this project"
    changes: ClassVar[str] = "slow pairs stop rotating at a distance"

    saturation_length: int | None = None
    """Distance in tokens at which slow pairs stop, `W`; by default half the trained length."""
    max_angle: float | None = None
    """Largest relative angle of every pair, in radians, in place of `saturation_length`."""
    max_angles: tuple[float, ...] | None = None
    """The same for each pair, `[R / 2]`; `inf` leaves a pair alone."""

    def __post_init__(self) -> None:
        given = [name for name in ("saturation_length", "max_angle", "max_angles") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RopeScalingError(f"Give one of {', '.join(f'`{name}`' for name in given)}.")
        keep_whole(self, "saturation_length")
        if self.max_angle is not None:
            check_number("max_angle", self.max_angle, above=0.0)
        if self.max_angles is not None:
            object.__setattr__(self, "max_angles", check_sequence("max_angles", self.max_angles))
            for angle in self.max_angles:
                if angle != math.inf:
                    check_number("max_angles", angle, at_least=0.0)

    def spans(self, rope: Rope) -> list[Span]:
        if self.max_angle is None and self.max_angles is None:
            return self._slow_pairs(rope)
        angles = torch.tensor(self.max_angles or (self.max_angle,), dtype=torch.float64)
        if len(angles) not in (1, len(rope.inv_freq)):
            raise RopeScalingError(
                f"`max_angles` has {len(angles)} numbers; this model rotates {len(rope.inv_freq)} pairs. Give one "
                "for each."
            )
        return _bands(rope, angles.expand(len(rope.inv_freq)))

    def _slow_pairs(self, rope: Rope) -> list[Span]:
        window = self.saturation_length or half(rope)
        slow = 2 * math.pi / rope.inv_freq > window  # [R / 2]
        if not slow.any():
            raise RopeScalingError(
                f"No pair of this model has a wavelength beyond {window} tokens, so `angle_clip` would change "
                "nothing. Give a smaller `saturation_length`, or `max_angle`."
            )
        return [within(window), _saturated(rope, slow, window * rope.inv_freq, window, None)]


def _saturated(rope: Rope, held: torch.Tensor, angles: torch.Tensor, nearest: int, farthest: int | None) -> Span:
    """Keys at distances from `nearest` to below `farthest`, where the pairs in `held` stay at `angles`."""
    moving = torch.where(held, 0.0, rope.inv_freq)

    def query(positions: torch.Tensor) -> torch.Tensor:
        is_held, largest, inv_freq = (constant_on(x, positions.device) for x in (held, angles, rope.inv_freq))
        return torch.where(is_held, largest, positions.double()[:, None] * inv_freq)

    def key(positions: torch.Tensor) -> torch.Tensor:
        return positions.double()[:, None] * constant_on(moving, positions.device)

    span = beyond(nearest, query, key)
    return span if farthest is None else Span(lambda m: (m - farthest + 1).clamp(min=0), span.last, query, key)


def _bands(rope: Rope, angles: torch.Tensor) -> list[Span]:
    """One span for every set of saturated pairs: pair `i` saturates at distance `angles[i] / inv_freq[i]`."""
    distances = saturation_distances(rope, angles)
    limits = sorted({int(distance) for distance in distances.tolist() if distance != math.inf and distance > 0})
    spans: list[Span] = []
    for nearest, farthest in zip([0, *limits], [*limits, None], strict=True):
        held = distances <= nearest
        if held.any():
            before = spans[-1] if spans and spans[-1].query else None
            spans.append(replace(_saturated(rope, held, angles, nearest, farthest), after=before))
        else:
            spans.append(within(farthest) if farthest else Span(torch.zeros_like, causal))
    return spans


def saturation_distances(rope: Rope, angles: torch.Tensor) -> torch.Tensor:
    """The first whole distance at which each pair has its largest angle, `[R / 2]`; `inf` for never."""
    # A pair that is saturated to within rounding is saturated.
    return torch.where(rope.inv_freq > 0, torch.ceil(angles / rope.inv_freq - 1e-9), math.inf)
