"""What a run says of each method in a few numbers, and conditions on them that a script can check."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.eval.documents import parse_lengths
from rope_scaling.eval.files import Row
from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.report.task_rows import rows_by_task
from rope_scaling.eval.tasks.base import SummaryEntry


def summary_entries(rows: list[Row]) -> list[tuple[str, SummaryEntry]]:
    """Methods and the numbers that matter most of each, task by task, from rows of one model."""
    entries = []
    for task in sorted(rows_by_task(rows), key=lambda task: (task.shown_by.place, task.task)):
        for method in dict.fromkeys(row["method"] for row in task.rows):
            own = [row for row in task.rows if row["method"] == method]
            entries += [(method, entry) for entry in task.shown_by.summary(own)]
    return entries


def summary_numbers(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Numbers of each method by the names that conditions use."""
    numbers: dict[str, dict[str, float]] = {row["method"]: {} for row in rows}
    for method, entry in summary_entries(rows):
        if entry.value is not None:
            numbers[method][entry.name] = entry.value
    return numbers


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
    numbers = summary_numbers(rows)
    if method is not None and method not in numbers:
        raise unknown_name("method of this report", method, numbers)
    chosen = [method] if method is not None else [label for label in numbers if label not in (UNPATCHED, CROPPING)]
    limit = _number(value, rows[0]["trained_length"])
    lines = []
    for label in chosen:
        if name not in numbers[label]:
            raise unknown_name(f"number of {label!r}:", name, numbers[label])
        if _OPERATORS[sign](numbers[label][name], limit):
            lines.append(f"{label}: {name} is {numbers[label][name]:g}, which is {sign} {value}")
    return lines


def _number(text: str, trained_length: int) -> float:
    if text.lower().endswith("x"):
        return parse_lengths([text], trained_length)[0]
    try:
        return float(text)
    except ValueError:
        raise RopeScalingError(f"A condition compares with a number or a length such as `4x`; got {text!r}.") from None
