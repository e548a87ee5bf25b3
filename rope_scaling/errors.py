"""The one exception that users meet, and the helpers that word it: what was given, what is allowed, what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class RopeScalingError(ValueError):
    """Something the user gave, or the model at hand, does not allow what was asked; the message says what would."""


def unknown_name(kind: str, given: str, available: Iterable[str]) -> RopeScalingError:
    """The error for a name that is not in a list, with the nearest that is."""
    names = sorted(available)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) > _MOST_NAMES:
        listed = f"Nearest of {len(names)}: {', '.join(get_close_matches(given, names, n=10, cutoff=0.4))}"
    else:
        listed = f"Available: {', '.join(names)}"
    return RopeScalingError(f"Unknown {kind} {given!r}.{hint} {listed}.")


_MOST_NAMES = 100
"""A longer list would hide the message."""


def check_number(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> float:
    """`value` as a finite float within bounds.

    Raises:
        RopeScalingError: `value` is not a number, not finite, or out of bounds.
    """
    bound = f", at least {at_least:g}" if at_least is not None else f", above {above:g}" if above is not None else ""
    wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if wrong or (at_least is not None and value < at_least) or (above is not None and value <= above):
        raise RopeScalingError(f"`{name}` must be a finite number{bound}; got {value!r}.")
    return float(value)


def check_length(name: str, value: Any) -> int:
    """`value` as a positive whole number of tokens.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value
        or value < 1
        or value != int(value)
    ):
        raise RopeScalingError(f"`{name}` must be a whole number of tokens, at least 1; got {value!r}.")
    return int(value)


def check_count(name: str, value: Any) -> int:
    """`value` as a whole number, 0 or more.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RopeScalingError(f"`{name}` must be a whole number, at least 0; got {value!r}.")
    return value
