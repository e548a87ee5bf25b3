"""Rotating pairs of dimensions by given angles, from where the model has left them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rope_scaling.devices import constant_on


_BLOCK = 1024
"""Positions at a time on a CPU, so that what is needed in between stays small and in the processor's cache."""
_LARGE_BLOCK = 65536
"""The same on other devices, where every step is a kernel launch."""


@dataclass(frozen=True)
class RotaryLayout:
    """Which dimensions of a head are rotated, and which of them form a pair."""

    rotary_dim: int
    """Rotary width `R`."""
    interleaved: bool = False
    """Pairs are neighbours `(2i, 2i + 1)`; otherwise halves, `(i, i + R / 2)`."""
    start: int = 0
    """First dimension that is rotated."""
    backward: bool = False
    """The model rotates by negative angles."""

    def pairs(self, x: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of both members of the pairs `low .. high - 1`, each `[..., high - low]`."""
        if self.interleaved:
            part = x[..., self.start + 2 * low : self.start + 2 * high]
            one, two = part[..., 0::2], part[..., 1::2]
        else:
            half = self.start + self.rotary_dim // 2
            one, two = x[..., self.start + low : self.start + high], x[..., half + low : half + high]
        return (two, one) if self.backward else (one, two)


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of the pairs `low .. high - 1` at every position, with a gain; other pairs stay as they are."""

    cos: torch.Tensor
    """Gain times cosine, `[T, high - low]`, float32."""
    sin: torch.Tensor
    low: int

    @staticmethod
    def by(angles: torch.Tensor, gain: torch.Tensor | None = None) -> Rotation | None:
        """The rotation by `angles` (`[T, R / 2]`, float64), or `None` if it leaves everything where it is."""
        return Rotation.made(lambda begin, end: angles[begin:end], len(angles), gain)

    @staticmethod
    def on_device(
        angles: Callable[[int, int], torch.Tensor], length: int, gain: torch.Tensor | None = None
    ) -> Rotation:
        """The rotation of all pairs, computed where `angles` gives its values and without reading any of them."""
        blocks = []
        for begin in range(0, length, _LARGE_BLOCK):
            block = angles(begin, min(begin + _LARGE_BLOCK, length))
            blocks.append((block.cos().float(), block.sin().float()))
        cos, sin = (
            blocks[0][which] if len(blocks) == 1 else torch.cat([b[which] for b in blocks]) for which in (0, 1)
        )
        if gain is not None:
            factor = constant_on(gain, cos.device).float()
            cos, sin = cos * factor, sin * factor
        return Rotation(cos, sin, 0)

    @staticmethod
    def made(
        angles: Callable[[int, int], torch.Tensor], length: int, gain: torch.Tensor | None = None
    ) -> Rotation | None:
        """The same from a function of `begin` and `end` that gives the angles of some positions, block by block."""
        moved, blocks = None, []
        for begin in range(0, length, _BLOCK):
            block = angles(begin, min(begin + _BLOCK, length))
            some = (block != 0).any(0)
            moved = some if moved is None else moved | some
            blocks.append((block.cos().float(), block.sin().float()))
        if gain is not None and moved is not None:
            moved |= gain.cpu() != 1
        if moved is None or not moved.any():
            return None
        pairs = moved.nonzero()
        low, high = int(pairs[0]), int(pairs[-1]) + 1
        cos, sin = (torch.cat([block[which][:, low:high] for block in blocks]) for which in (0, 1))
        if gain is not None:
            factor = gain[low:high].cpu().float()
            cos, sin = cos * factor, sin * factor
        return Rotation(cos, sin, low)

    def part(self, begin: int, end: int) -> Rotation:
        """The rotation at positions `begin .. end - 1`."""
        return Rotation(self.cos[begin:end], self.sin[begin:end], self.low)

    def adjoint(self) -> Rotation:
        """What carries gradients back: the rotation back, with the same gain."""
        return Rotation(self.cos, -self.sin, self.low)

    def to(self, device: torch.device) -> Rotation:
        """The same on another device."""
        return Rotation(self.cos.to(device), self.sin.to(device), self.low)

    def apply(self, x: torch.Tensor, layout: RotaryLayout, in_place: bool = False) -> torch.Tensor:
        """`x` (`[..., T, d]`) rotated, in its own dtype; the arithmetic is float32 or better."""
        high = self.low + self.cos.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rotated = x if in_place else x.clone()
        size = _BLOCK if x.device.type == "cpu" else _LARGE_BLOCK
        for begin in range(0, x.shape[-2], size):
            part = slice(begin, begin + size)
            cos, sin = self.cos[part].to(wide), self.sin[part].to(wide)
            one, two = (pair.to(wide) for pair in layout.pairs(x[..., part, :], self.low, high))
            into_one, into_two = layout.pairs(rotated[..., part, :], self.low, high)
            new_one, new_two = torch.addcmul(one * cos, two, sin, value=-1), torch.addcmul(two * cos, one, sin)
            into_one.copy_(new_one)
            into_two.copy_(new_two)
        return rotated
