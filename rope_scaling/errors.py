"""The one exception that users meet, and the helpers that word it: what was given, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeGuard


class RopeScalingError(ValueError):
    """Something the user gave, or the model at hand, does not allow what was asked; the message says what would."""

    def __init__(self, message: str = ""):
        # What was given stands in messages, and may be a list of a million numbers.
        half = _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}")


_LONGEST = 1500
"""Characters of a message."""


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


def check_number(
    name: str, value: Any, *, at_least: float | None = None, above: float | None = None, at_most: float = 1e15
) -> float:
    """`value` as a finite float within bounds; larger ones than `at_most` serve nobody, and overflow somewhere.

    Raises:
        RopeScalingError: `value` is not a number, not finite, or out of bounds.
    """
    if is_number(value) and value > at_most:
        raise RopeScalingError(f"`{name}` must be at most {at_most:g}; got {value!r}.")
    bound = f", at least {at_least:g}" if at_least is not None else f", above {above:g}" if above is not None else ""
    if not is_number(value) or (at_least is not None and value < at_least) or (above is not None and value <= above):
        raise RopeScalingError(f"`{name}` must be a finite number{bound}; got {value!r}.")
    return float(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that a float holds: no truth value, not infinite, not a hundred digits long."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def check_length(name: str, value: Any) -> int:
    """`value` as a positive whole number of tokens.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if not is_number(value) or value < 1 or value != int(value):
        raise RopeScalingError(f"`{name}` must be a whole number of tokens, at least 1; got {value!r}.")
    if value > _MOST_TOKENS:
        raise RopeScalingError(f"`{name}` must be at most {_MOST_TOKENS} tokens; got {value!r}.")
    return int(value)


_MOST_TOKENS = 2**40


def check_sequence(name: str, value: Any) -> tuple[Any, ...]:
    """`value` as a tuple of at least one item.

    Raises:
        RopeScalingError: `value` is no list, or an empty one.
    """
    items = () if isinstance(value, (str, dict)) or not hasattr(value, "__iter__") else tuple(value)
    if not items:
        raise RopeScalingError(f"`{name}` must be a list of one or more; got {value!r}.")
    return items


def check_count(name: str, value: Any) -> int:
    """`value` as a whole number, 0 or more.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if not is_number(value) or value < 0 or value != int(value):
        raise RopeScalingError(f"`{name}` must be a whole number, at least 0; got {value!r}.")
    return int(value)


def keep_whole(owner: Any, *names: str, check: Callable[[str, Any], int] = check_length) -> None:
    """Checks fields of a frozen dataclass, and makes them `int`: divisions and JSON give floats.

    Raises:
        RopeScalingError: one is no whole number as `check` wants it, nor `None` where the type has that.
    """
    for field in fields(owner):
        value = getattr(owner, field.name)
        if field.name in names and (value is not None or "None" not in str(field.type)):
            object.__setattr__(owner, field.name, check(field.name, value))
