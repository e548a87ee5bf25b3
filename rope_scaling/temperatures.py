"""Temperatures: the query scaled by a function of its own position."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from rope_scaling.errors import check_number, keep_whole
from rope_scaling.notation import MethodBase


@dataclass(frozen=True, kw_only=True)
class Temperature(MethodBase, ABC):
    """Multiplies the whole query, and so every logit of its row, by a function of the query's position."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    changes: ClassVar[str] = "a temperature of the user's own"
    needs_training: ClassVar[str] = "no"
    decides: ClassVar[frozenset[str]] = frozenset({"temperature"})

    @abstractmethod
    def scale(self, positions: torch.Tensor, trained_length: int) -> torch.Tensor:
        """What queries are multiplied with.

        Args:
            positions (`torch.Tensor`): Query positions from 0, `[T]`, int64.
            trained_length (`int`): Tokens that the model reads with its frequencies.

        Returns:
            `torch.Tensor`: `[T]`, float64.
        """


@dataclass(frozen=True, kw_only=True)
class LogN(Temperature):
    """`max(1, ln(m + 1) / ln(L0))`, which keeps the entropy of attention as texts grow
    ([kexue.fm 8823](https://kexue.fm/archives/8823)). Nothing changes inside the trained length."""

    name: ClassVar[str] = "log_n"
    paper: ClassVar[str] = "https://kexue.fm/archives/8823"
    changes: ClassVar[str] = "queries grow with log position"

    length: int | None = None
    """Length in tokens from which on queries grow; by default the trained length."""

    def __post_init__(self) -> None:
        keep_whole(self, "length")

    def scale(self, positions: torch.Tensor, trained_length: int) -> torch.Tensor:
        length = max(self.length or trained_length, 2)
        return (torch.log(positions.double() + 1) / math.log(length)).clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class Llama4(Temperature):
    """`1 + beta ln(1 + floor((m + 1) / f))`, as in Llama 4 and Ministral 3, after
    [Scalable-Softmax](https://huggingface.co/papers/2501.19399)."""

    name: ClassVar[str] = "llama4"
    paper: ClassVar[str] = "https://huggingface.co/papers/2501.19399"
    changes: ClassVar[str] = "queries grow in steps, with log position"

    attn_scale: float = 0.1
    """`beta`."""
    floor_scale: int = 8192
    """Tokens of a step, `f`; inside the first one nothing changes."""

    def __post_init__(self) -> None:
        check_number("attn_scale", self.attn_scale, at_least=0.0)
        keep_whole(self, "floor_scale")

    def scale(self, positions: torch.Tensor, trained_length: int) -> torch.Tensor:
        return torch.log1p(((positions + 1) // self.floor_scale).double()) * self.attn_scale + 1.0


@dataclass(frozen=True, kw_only=True)
class Constant(Temperature):
    """One factor for every query, such as DroPE's fitted one ([paper](https://huggingface.co/papers/2512.12167))."""

    name: ClassVar[str] = "constant"
    paper: ClassVar[str] = "https://huggingface.co/papers/2512.12167"
    changes: ClassVar[str] = "queries times a number"

    value: float
    """The factor."""

    def __post_init__(self) -> None:
        check_number("value", self.value, above=0.0)

    def scale(self, positions: torch.Tensor, trained_length: int) -> torch.Tensor:
        return torch.full(positions.shape, float(self.value), dtype=torch.float64, device=positions.device)


TEMPERATURES: dict[str, type[Temperature]] = {"log_n": LogN, "llama4": Llama4, "constant": Constant}
