"""What a run says of each method in a few numbers, and conditions on them that a script can check."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.eval.documents import parse_lengths
from rope_scaling.eval.methods import CROPPING, UNPATCHED


Row = dict[str, Any]


@dataclass
class Summary:
    """Rows that matter most of one method; `None` where the run has no such row."""

    usable_length: Row | None = None
    """The longest length whose last bucket is as good as the unpatched model just below 1x."""
    tax: Row | None = None
    """The prefix (0,1x], paired against the unpatched model."""
    far: Row | None = None
    """The last bucket of positions."""
    context_gain: Row | None = None
    """At the longest length."""
    repeats: Row | None = None
    """Tokens beyond 1x that repeat what stood more than 1x back."""
    accuracy: dict[str, Row] = field(default_factory=dict)
    """Retrieval tasks at the longest length."""

    def numbers(self) -> dict[str, float]:
        """By the names that conditions use."""
        found: dict[str, float] = {}
        if self.usable_length is not None:
            found["usable_length"] = self.usable_length["usable_length"]
        if self.tax is not None:
            found["tax"] = self.tax["difference"]
        if self.far is not None:
            found["nll"] = self.far["nll"]
            if "to_cropping" in self.far:
                found["to_cropping"] = self.far["to_cropping"]
        if self.context_gain is not None:
            found["context_gain"] = self.context_gain["gain"]
        if self.repeats is not None:
            found["repeats"] = self.repeats["to_cropping"]
        return found | {f"{task}.accuracy": row["accuracy"] for task, row in self.accuracy.items()}


def summarise(rows: list[Row]) -> dict[str, Summary]:
    """A summary of each method, from rows of one model."""
    found = {method: Summary() for method in dict.fromkeys(row["method"] for row in rows)}
    for row in rows:
        one, kind = found[row["method"]], row["measure"]
        last = row.get("to") == row["lengths"][-1]
        if kind == "usable_length":
            one.usable_length = row
        elif row["task"] == "perplexity" and kind == "prefix" and row["to"] == row["trained_length"]:
            one.tax = row
        elif row["task"] == "perplexity" and kind == "bucket" and last:
            one.far = row
        elif kind == "context" and last:
            one.context_gain = row
        elif kind == "repeats":
            one.repeats = row
        elif kind == "length" and last:
            one.accuracy[row["task"]] = row
    return found


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*(?:(?P<method>.+?)\s*:\s*)?(?P<name>[\w.]+)\s*(?P<sign><=|>=|<|>)\s*(?P<value>\S+)\s*")


def failures(rows: list[Row], condition: str) -> list[str]:
    """Which methods meet a condition such as `usable_length < 4x` or `yarn: niah_multikey.accuracy < 0.9`.

    Without a method, all but the baselines are looked at.

    Returns:
        A line a method that meets it.

    Raises:
        RopeScalingError: the condition cannot be read, names no method of the rows, or a number that they do not hold.
    """
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise RopeScalingError(
            f"A condition is `NAME < VALUE`, as in 'usable_length < 4x' or 'yarn: tax > 0.02'; got {condition!r}."
        )
    method, name, sign, value = match.groups()
    summary = summarise(rows)
    if method is not None and method not in summary:
        raise unknown_name("method of this report", method, summary)
    chosen = [method] if method is not None else [one for one in summary if one not in (UNPATCHED, CROPPING)]
    limit = _number(value, rows[0]["trained_length"])
    lines = []
    for one in chosen:
        numbers = summary[one].numbers()
        if name not in numbers:
            raise unknown_name(f"number of {one!r}:", name, numbers)
        if _OPERATORS[sign](numbers[name], limit):
            lines.append(f"{one}: {name} is {numbers[name]:g}, which is {sign} {value}")
    return lines


def _number(text: str, trained_length: int) -> float:
    if text.lower().endswith("x"):
        return parse_lengths([text], trained_length)[0]
    try:
        return float(text)
    except ValueError:
        raise RopeScalingError(f"A condition compares with a number or a length such as `4x`; got {text!r}.") from None
