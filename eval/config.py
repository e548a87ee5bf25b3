"""What a run measures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from rope_scaling.errors import RopeScalingError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run measures; two runs with equal settings give equal rows."""

    model: str
    data: str
    lengths: list[int]
    """Lengths in tokens, ascending."""
    trained_length: int
    """Context length of the model as loaded, in tokens: `1x`."""
    factor: float
    """Factor that methods are patched with."""
    dtype: str
    device: str
    chunk_size: int = 2048
    """Tokens of a forward call."""
    seed: int = 0
    weights_sha256: str = ""
    """Hash of what the unpatched model computes with; `evaluate` computes it."""


def check_lengths(lengths: list[int]) -> None:
    """Raises `RopeScalingError` unless lengths are at least 2 tokens and strictly ascending."""
    if not lengths or any(length < 2 for length in lengths):
        raise RopeScalingError(f"`lengths` must be one or more numbers of tokens, at least 2; got {lengths}.")
    if any(later <= earlier for earlier, later in pairwise(lengths)):
        raise RopeScalingError(
            f"`lengths` must be ascending, without repetition; got {lengths}. Give {sorted(set(lengths))}."
        )
