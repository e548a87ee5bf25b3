"""Local and global layers in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rope_scaling.errors import RopeScalingError, check_sequence, keep_whole, unknown_name
from rope_scaling.spans.base import Rope, Span, SpanMethod, compose, plain
from rope_scaling.spans.sliding_window import SlidingWindow


@dataclass(frozen=True, kw_only=True)
class Alternating(SpanMethod):
    """Most layers see a local window, every few see everything, each kind by a method of its own
    ([Gemma 3](https://huggingface.co/papers/2503.19786)).

    A model that was not trained so loses by it without fine-tuning; what it gains is a smaller cache and cheaper
    layers.
    """

    name: ClassVar[str] = "alternating"
    paper: ClassVar[str] = "https://huggingface.co/papers/2503.19786"
    changes: ClassVar[str] = "local and global layers in turn"
    needs_training: ClassVar[str] = "helps"
    decides: ClassVar[frozenset[str]] = frozenset({"map", "window"})

    local: SpanMethod = field(default_factory=SlidingWindow)
    """Method of local layers."""
    everywhere: SpanMethod | None = None
    """Method of global layers; by default attention as it is."""
    global_every: int = 6
    """Every so many layers one is global: the last of each such group."""
    layer_kinds: tuple[str, ...] | None = None
    """`local` or `global` for each layer, in place of `global_every`."""

    def __post_init__(self) -> None:
        keep_whole(self, "global_every")
        for name, method in (("local", self.local), ("everywhere", self.everywhere)):
            if name == "everywhere" and method is None:
                continue
            if not isinstance(method, SpanMethod) or "frequency" in method.decides:
                raise RopeScalingError(
                    f"`{name}` must be a window or a map, such as `SlidingWindow(window=1024)`; got {method!r}."
                )
        if self.layer_kinds is not None:
            object.__setattr__(self, "layer_kinds", check_sequence("layer_kinds", self.layer_kinds))
            for kind in self.layer_kinds:
                if kind not in ("local", "global"):
                    raise unknown_name("kind of layer", str(kind), ["local", "global"])

    def layer_kind(self, rope: Rope, layer: int) -> str:
        """`local` or `global`."""
        if self.layer_kinds is None:
            return "local" if (layer + 1) % self.global_every else "global"
        if rope.num_layers is not None and len(self.layer_kinds) != rope.num_layers:
            raise RopeScalingError(
                f"`layer_kinds` names {len(self.layer_kinds)} layers; this model has {rope.num_layers}. Give "
                "one each, or `global_every`."
            )
        return self.layer_kinds[layer]

    def layer_spans(self, rope: Rope, layer: int) -> list[Span]:
        method = self.local if self.layer_kind(rope, layer) == "local" else self.everywhere
        return compose(method.spans(rope), plain()) if method else plain()

    def layer_retained(self, rope: Rope, layer: int) -> tuple[int, int] | None:
        method = self.local if self.layer_kind(rope, layer) == "local" else self.everywhere
        return method.retained(rope) if method else None

    def spans(self, rope: Rope) -> list[Span]:
        return self.layer_spans(rope, 0)

    def reach(self, rope: Rope) -> int | None:
        reaches = [method.reach(rope) for method in (self.local, self.everywhere) if method]
        return min((reach for reach in reaches if reach is not None), default=None)
