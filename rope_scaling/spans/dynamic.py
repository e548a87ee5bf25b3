"""Dynamic scaling as a function of the query's own position."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, TypeVar

import torch

from rope_scaling.errors import RopeScalingError, check_length, check_number, check_sequence, keep_whole
from rope_scaling.frequencies import FrequencyMethod, Linear, LongRope, Ntk, Yarn
from rope_scaling.frequencies.longrope import check_factors
from rope_scaling.geometry import default_inv_freq
from rope_scaling.spans.base import Rope, Span, SpanMethod


Self = TypeVar("Self", bound="Dynamic")


@dataclass(frozen=True, kw_only=True)
class Dynamic(SpanMethod):
    """What the dynamic methods share: a query at position `m` rotates itself and all keys it sees with the frequencies
    of the first step of at least `m + 1` tokens.

    A token's logits so depend on the tokens before it and on nothing else, neither on what a cache was filled with
    nor on the length of the call, and inside the trained length they are the pretrained ones. Transformers' own
    `dynamic` leaves keys in the cache at the frequencies they were stored with.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"frequency", "map"})

    steps: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    """Factors of the trained length, ascending; 1 stands for the pretrained frequencies."""
    length: int | None = None
    """One length in tokens to fix the frequencies for, whatever the position; see `freeze`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_sequence("steps", self.steps))
        for step in self.steps:
            check_number("steps", step, at_least=1.0)
        if any(later <= earlier for earlier, later in pairwise(self.steps)):
            raise RopeScalingError(
                f"`steps` must be one or more ascending factors, as in (1, 2, 4); got {self.steps}."
            )
        keep_whole(self, "length")

    def freeze(self: Self, length: int) -> Self:
        """The same method with the frequencies that suit one known length, at every position.

        Args:
            length (`int`): Tokens of the longest text, prompt and answer together.
        """
        return replace(self, length=check_length("length", length))

    @abstractmethod
    def at(self, factor: float) -> FrequencyMethod:
        """The static method for a step."""

    def begins(self, rope: Rope) -> int:
        """The length in tokens that `steps` are factors of."""
        return rope.trained_length

    def spans(self, rope: Rope) -> list[Span]:
        trained = self.begins(rope)
        if self.length is not None:
            return [self._step(rope, max(self.length / trained, 1.0), 0, None)]
        ends = [round(trained * step) for step in self.steps]
        ranges = zip(self.steps, [0, *ends[:-1]], [*ends[:-1], None], strict=True)
        return [self._step(rope, factor, begin, end) for factor, begin, end in ranges]

    def reach(self, rope: Rope) -> int:
        return self.length or round(self.begins(rope) * self.steps[-1])

    def frequencies(self, rope: Rope, factor: float) -> tuple[torch.Tensor, float] | None:
        """Frequencies (float64) and attention factor of a step; `None` for those in effect."""
        if factor == 1.0:
            return None
        method = self.at(factor)
        return rope.scaled(method) if rope.scaled else method.frequencies(rope.geometry)

    def _step(self, rope: Rope, factor: float, begin: int, end: int | None) -> Span:
        """All keys, for queries from `begin` to below `end`."""

        def first(m: torch.Tensor) -> torch.Tensor:
            return m * 0 if end is None else torch.where(m < end, 0, m + 1)

        def last(m: torch.Tensor) -> torch.Tensor:
            return torch.where(m < begin, -1, m)

        found = self.frequencies(rope, factor)
        if found is None:
            return Span(first, last)
        inv_freq, attention_factor = found
        angles = replace(rope, inv_freq=inv_freq.double()).positions(lambda positions: positions)
        gain = (attention_factor / rope.attention_factor) ** 2
        return Span(first, last, angles, angles, None if gain == 1 else torch.full_like(rope.inv_freq, gain))


@dataclass(frozen=True, kw_only=True)
class DynamicLinear(Dynamic):
    """Linear interpolation by the step that the query's position needs ([paper](https://huggingface.co/papers/2306.15595))."""

    name: ClassVar[str] = "dynamic_linear"
    nearest_static: ClassVar[str] = "linear"
    paper: ClassVar[str] = "https://huggingface.co/papers/2306.15595"
    changes: ClassVar[str] = "linear, by the query's position"
    needs_training: ClassVar[str] = "yes"

    def at(self, factor: float) -> FrequencyMethod:
        return Linear(factor=factor)


@dataclass(frozen=True, kw_only=True)
class DynamicNtk(Dynamic):
    """NTK scaling by the step that the query's position needs ([paper](https://huggingface.co/papers/2309.00071))."""

    name: ClassVar[str] = "dynamic_ntk"
    nearest_static: ClassVar[str] = "ntk"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.00071"
    changes: ClassVar[str] = "ntk, by the query's position"
    needs_training: ClassVar[str] = "helps"

    def at(self, factor: float) -> FrequencyMethod:
        return Ntk(factor=factor)


@dataclass(frozen=True, kw_only=True)
class DynamicYarn(Dynamic):
    """YaRN by the step that the query's position needs, temperature included
    ([paper](https://huggingface.co/papers/2309.00071))."""

    name: ClassVar[str] = "dynamic_yarn"
    paper: ClassVar[str] = "https://huggingface.co/papers/2309.00071"
    changes: ClassVar[str] = "yarn, by the query's position"
    needs_training: ClassVar[str] = "helps"

    beta_fast: float = 32.0
    """As in `yarn`."""
    beta_slow: float = 1.0
    """As in `yarn`."""

    def at(self, factor: float) -> FrequencyMethod:
        return Yarn(factor=factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)


@dataclass(frozen=True, kw_only=True)
class DynamicLongRope(Dynamic):
    """LongRoPE's switch: short factors for queries inside the trained length, long ones beyond
    ([paper](https://huggingface.co/papers/2402.13753)).

    Transformers switches with the length of the call and leaves keys in the cache behind; here the switch is the
    query's.
    """

    name: ClassVar[str] = "dynamic_longrope"
    nearest_static: ClassVar[str] = "longrope"
    paper: ClassVar[str] = "https://huggingface.co/papers/2402.13753"
    changes: ClassVar[str] = "longrope's switch, by query position"
    needs_training: ClassVar[str] = "yes"

    long_factor: tuple[float, ...]
    """How much slower each pair rotates beyond the trained length, `[R / 2]`."""
    short_factor: tuple[float, ...] | None = None
    """The same inside it; by default 1."""
    factor: float
    """Target length over trained length."""
    attention_factor: float | None = None
    """Multiplier of cos and sin on both sides of the switch; by default `sqrt(1 + ln s / ln L0)`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", (1.0, check_number("factor", self.factor, above=1.0)))
        for name in ("long_factor", "short_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_factors(name, getattr(self, name)))
        super().__post_init__()

    def begins(self, rope: Rope) -> int:
        # Of a model loaded with both lists, the length before any scaling, which is where it switches.
        return rope.geometry.original_max_position_embeddings

    def at(self, factor: float) -> FrequencyMethod:
        return LongRope(long_factor=self.long_factor, factor=self.factor, attention_factor=self.attention_factor)

    def frequencies(self, rope: Rope, factor: float) -> tuple[torch.Tensor, float]:
        long, attention_factor = self.at(self.factor).frequencies(rope.geometry)
        if factor > 1:
            return long, attention_factor
        short: Sequence[float] = self.short_factor or (1.0,) * len(long)
        if len(short) != len(long):
            raise RopeScalingError(f"`short_factor` has {len(short)} numbers; this model rotates {len(long)} pairs.")
        return default_inv_freq(rope.geometry) / torch.tensor(short, dtype=torch.float64), attention_factor
