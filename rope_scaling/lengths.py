"""Lengths as they are written: `32768` or `32k` tokens, or `8x`, eight times the length that a model reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rope_scaling.errors import RopeScalingError, check_length


_UNITS = {"": 1, "k": 2**10, "m": 2**20}
_TOKENS = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d+)?)([km]?)", re.IGNORECASE)
_MULTIPLE = re.compile(r"(\d+(?:\.\d*)?)x", re.IGNORECASE)
_MOST = 2**53


def tokens(name: str, value: Any) -> int:
    """A length in tokens, from `32768`, `32k` (32,768) or `1m` (1,048,576).

    Args:
        name (`str`): What the length is called, for messages.
        value (`int` or `str`): The length as it is written.

    Raises:
        RopeScalingError: it is not a whole number of tokens, at least 1.
    """
    written = _TOKENS.fullmatch(value.strip()) if isinstance(value, str) else None
    if written is None:
        return check_length(name, value)
    return check_length(name, float(written[1]) * _UNITS[written[2].lower()])


def has_unit(text: str) -> bool:
    """Whether a text is a number of tokens with a unit, such as `32k`."""
    written = _TOKENS.fullmatch(text)
    return written is not None and written[2] != ""


def multiple(value: Any) -> float | None:
    """8.0 for `8x`, and `None` for what is not written so."""
    written = _MULTIPLE.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(written[1]) if written else None


def tokens_or_multiple(name: str, value: Any) -> int | str:
    """A length in tokens, or a multiple of the length that a model reads, spelt as `8x`.

    Raises:
        RopeScalingError: it is neither.
    """
    times = multiple(value)
    if times is None and isinstance(value, str) and _TOKENS.fullmatch(value.strip()) is None:
        raise RopeScalingError(f"`{name}` takes tokens such as 32768 or 32k, or a multiple such as 8x; got {value!r}.")
    if times is None:
        return tokens(name, value)
    if not 0 < times < _MOST:
        raise RopeScalingError(f"`{name}` must be a multiple above 0 of the trained length; got {value!r}.")
    return f"{times!r}x".replace(".0x", "x")


def in_tokens(name: str, value: Any, trained_length: int) -> int:
    """A length in tokens, from tokens or a multiple of a trained length.

    Raises:
        RopeScalingError: it is neither.
    """
    times = multiple(value)
    return tokens(name, value) if times is None else check_length(name, int(times * trained_length))


def parse_lengths(parts: Iterable[str | int], trained_length: int) -> list[int]:
    """Reads `1x`, `2x`, `16384`, `32k`: multiples of the trained length, or tokens.

    Raises:
        RopeScalingError: a part is neither.
    """
    lengths = []
    for part in parts:
        try:
            lengths.append(in_tokens("lengths", part, trained_length))
        except RopeScalingError:
            raise RopeScalingError(
                f"`lengths` takes numbers of tokens such as '32k', or multiples such as '1x,2x'; got {part!r}."
            ) from None
    return lengths
