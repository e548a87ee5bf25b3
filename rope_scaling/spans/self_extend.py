"""Self-Extend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from rope_scaling.errors import RopeScalingError, keep_whole
from rope_scaling.spans.base import Rope, Span, SpanMethod, beyond, within
from rope_scaling.spans.rerope import half


@dataclass(frozen=True, kw_only=True)
class SelfExtend(SpanMethod):
    """Beyond a window, positions count in groups ([paper](https://huggingface.co/papers/2401.01325)).

    `rho = D` for `D < w`, else `floor(m / G) - floor(n / G) + w - floor(w / G)`. The authors' code has `w / G`
    unrounded in one of its paths and rounded in another, which gives different answers for `G` that do not divide
    `w`; here it is rounded everywhere.
    """

    name: ClassVar[str] = "self_extend"
    paper: ClassVar[str] = "https://huggingface.co/papers/2401.01325"
    changes: ClassVar[str] = "positions in groups beyond a window"

    group_size: int = 8
    """Neighbouring tokens that share a position beyond the window, `G`; 2 to 64 in the paper."""
    window: int | None = None
    """Distance in tokens up to which nothing changes, `w`; by default half the trained length."""

    def __post_init__(self) -> None:
        keep_whole(self, "group_size", "window")

    def spans(self, rope: Rope) -> list[Span]:
        window, group = self.window or half(rope), self.group_size
        if window >= rope.trained_length:
            raise RopeScalingError(
                f"`window` is {window} and the model was trained on {rope.trained_length} tokens, so no room is left "
                f"for groups beyond it. Give less than {rope.trained_length}, such as {half(rope)}."
            )
        query = rope.positions(lambda m: m // group + window - window // group)
        return [within(window), beyond(window, query, rope.positions(lambda n: n // group))]

    def reach(self, rope: Rope) -> int:
        window = self.window or half(rope)
        # G (L0 - w) + w where groups divide the window
        return self.group_size * (rope.trained_length - window + window // self.group_size)

    @classmethod
    def sweep_fields(cls, factor: float) -> dict[str, Any]:
        """Groups for a context of `factor` trained lengths, `G (L0 - w) + w`, with the default window `w = L0 / 2`."""
        return {"group_size": max(math.ceil(2 * factor), 2)}
