"""How numbers are written: tables as text, lengths, intervals. A task makes its tables of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rope_scaling.eval.files import Row


@dataclass(frozen=True)
class Table:
    """A title, a header and lines; the first column names methods."""

    title: str
    lines: list[list[str]]


def markdown(lines: list[list[str]]) -> list[str]:
    """Header and lines of a table in Markdown."""
    texts = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [texts[0], "|" + " --- |" + " ---: |" * (len(lines[0]) - 1), *texts[1:]]


def length_name(length: int, trained_length: int) -> str:
    """`2x` for twice the trained length; other lengths by their tokens."""
    ratio = length / trained_length
    if length == 0:
        return "0"
    return f"{ratio:g}x" if ratio in (0.25, 0.5) or ratio == int(ratio) else f"{length}"


def bucket_name(start: int, end: int, trained_length: int) -> str:
    """`(1x,2x]` for the positions after the trained length up to twice it."""
    return f"({length_name(start, trained_length)},{length_name(end, trained_length)}]"


def bucket_names(rows: list[Row]) -> list[tuple[tuple[int, int], str]]:
    """The buckets that rows have, each with its name, in order."""
    buckets = sorted({(row["from"], row["to"]) for row in rows if row["measure"] == "bucket"})
    return [(bucket, bucket_name(*bucket, rows[0]["trained_length"])) for bucket in buckets]


def perplexity_text(nll: float) -> str:
    """Perplexity with two decimals, or fewer digits where it is large."""
    value = math.exp(min(nll, 700))
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def difference_text(row: Row, field: str = "difference") -> str:
    """A paired difference in nats, with its interval where there is one."""
    text = f"{row[field]:+.2f}"
    low, high = row[f"{field}_low"], row[f"{field}_high"]
    return text if low is None else f"{text} [{low:+.2f},{high:+.2f}]"


def to_cropping_text(row: Row) -> str:
    """The paired difference to the cropping baseline, in nats."""
    return difference_text(row, "to_cropping")


def accuracy_text(row: Row) -> str:
    """Answers right of those asked, and the interval of the share in percent."""
    low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
    return f"{row['correct']}/{row['asked']} [{low:.0f},{high:.0f}]%"


def rows_by_method(rows: list[Row], columns: list[tuple[str, int, int]]) -> list[tuple[str, list[Row | None]]]:
    """Each method's rows for the columns: kind of measure, and the positions from and to."""
    cells = {(row["method"], row["measure"], row.get("from"), row.get("to")): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    return [(method, [cells.get((method, *column)) for column in columns]) for method in methods]


def lines_by_length(rows: list[Row], measure: str, text: Callable[[Row], str]) -> list[list[str]]:
    """Header and one line per method: a text made of the row of every length."""
    trained = rows[0]["trained_length"]
    lengths = sorted({row["to"] for row in rows if row["measure"] == measure})
    cells = {(row["method"], row["to"]): row for row in rows if row["measure"] == measure}
    header = ["method", *(length_name(length, trained) for length in lengths)]
    return [header] + [
        [method, *(text(cells[method, length]) if (method, length) in cells else "" for length in lengths)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]


def values_text(rows: list[Row], *keys: str) -> str:
    """What some rows hold under keys; where they hold several values, each with its methods."""
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key)
        methods.setdefault(str(value), {})[row["method"]] = None
    if len(methods) == 1:
        return next(iter(methods))
    return " and ".join(f"{value} ({', '.join(names)})" for value, names in methods.items())
