"""Tables, made from rows alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.summary import summarise


Row = dict[str, Any]

PROTOCOLS = ("yarn_truncate", "yarn_stride", "pose_stride", "longlora_stream")


@dataclass(frozen=True)
class Table:
    """A title, a header and lines; the first column names methods."""

    title: str
    lines: list[list[str]]


def length_name(length: int, trained_length: int) -> str:
    """`2x` for twice the trained length; other lengths by their tokens."""
    ratio = length / trained_length
    if length == 0:
        return "0"
    return f"{ratio:g}x" if ratio in (0.25, 0.5) or ratio == int(ratio) else f"{length}"


def bucket_names(rows: list[Row]) -> list[tuple[tuple[int, int], str]]:
    """The buckets that rows have, each with its name, in order."""
    buckets = sorted({(row["from"], row["to"]) for row in rows if row["measure"] == "bucket"})
    trained = rows[0]["trained_length"]
    return [(bucket, f"({length_name(bucket[0], trained)},{length_name(bucket[1], trained)}]") for bucket in buckets]


def perplexity_table(rows: list[Row]) -> list[list[str]]:
    """Header and one line a method: perplexity in every bucket of positions, then of all of the longest length."""
    longest, trained = rows[0]["lengths"][-1], rows[0]["trained_length"]
    columns = [("bucket", *bucket) for bucket, _ in bucket_names(rows)] + [("prefix", 0, longest)]
    names = [*(name for _, name in bucket_names(rows)), f"(0,{length_name(longest, trained)}]"]
    return [["method", *names]] + [
        [method, *("" if row is None else perplexity_text(row["nll"]) for row in found)]
        for method, found in _by_method(rows, columns)
    ]


def difference_table(rows: list[Row], field: str = "difference", omit: str = UNPATCHED) -> list[list[str]]:
    """Header and one line a method: a paired difference in the buckets around and beyond 1x."""
    trained = rows[0]["trained_length"]
    buckets = [bucket for bucket in bucket_names(rows) if bucket[0][1] >= trained]
    buckets = buckets[:1] + buckets[-2:] if len(buckets) > 3 else buckets
    return [["method", *(name for _, name in buckets)]] + [
        [method, *("" if row is None else difference_text(row, field) for row in found)]
        for method, found in _by_method(rows, [("bucket", *bucket) for bucket, _ in buckets])
        if method != omit
    ]


def repeats_table(rows: list[Row], text: Any, omit: str = "") -> list[list[str]]:
    """Header and one line a method: a text made of the row of tokens that repeat, and of the row of the others."""
    kinds = ("repeats", "others")
    found = _by_method(rows, [(kind, rows[0]["trained_length"], rows[0]["lengths"][-1]) for kind in kinds])
    return [["method", *kinds]] + [
        [method, *("" if row is None else text(row) for row in pair)] for method, pair in found if method != omit
    ]


def _by_method(rows: list[Row], columns: list[tuple[str, int, int]]) -> list[tuple[str, list[Row | None]]]:
    """Each method's rows for the columns: kind of measure, and the positions from and to."""
    found = {(row["method"], row["measure"], row.get("from"), row.get("to")): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    return [(method, [found.get((method, *column)) for column in columns]) for method in methods]


def _by_length(rows: list[Row], measure: str, text: Any) -> list[list[str]]:
    """Header and one line a method: a text made of the row of every length."""
    trained = rows[0]["trained_length"]
    lengths = sorted({row["to"] for row in rows if row["measure"] == measure})
    found = {(row["method"], row["to"]): row for row in rows if row["measure"] == measure}
    header = ["method", *(length_name(length, trained) for length in lengths)]
    return [header] + [
        [method, *(text(found[method, length]) if (method, length) in found else "" for length in lengths)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]


def perplexity_text(nll: float) -> str:
    """Perplexity with two decimals, or fewer digits where it is large."""
    value = math.exp(min(nll, 700))
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def difference_text(row: Row, field: str = "difference") -> str:
    """A paired difference in nats, with its interval where there is one."""
    text = f"{row[field]:+.2f}"
    low, high = row[f"{field}_low"], row[f"{field}_high"]
    return text if low is None else f"{text} [{low:+.2f},{high:+.2f}]"


def accuracy_text(row: Row) -> str:
    """Answers right of those asked, and the interval of the share in percent."""
    low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
    return f"{row['correct']}/{row['asked']} [{low:.0f},{high:.0f}]%"


def _score_text(row: Row) -> str:
    low, high = row["score_low"], row["score_high"]
    return f"{row['score']:.3f}" if low is None else f"{row['score']:.3f} [{low:.3f},{high:.3f}]"


def tables(rows: list[Row]) -> list[Table]:
    """Every table that rows of one model hold, the summary first."""
    found = []
    summary = summarise(rows)
    if any(one.usable_length is not None for one in summary.values()):
        found.append(Table("Summary", summary_table(rows)))
    tasks = {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(r["task"] for r in rows)}
    for task, own in tasks.items():
        trained = own[0]["trained_length"]
        kinds = {row["measure"] for row in own}
        if task == "perplexity":
            found.append(Table(f"Perplexity by position, 1x = {trained} tokens", perplexity_table(own)))
            title = "Difference to {} on the same tokens, nats a token, 95% interval"
            found.append(Table(title.format(UNPATCHED), difference_table(own)))
            if "to_cropping" in own[0]:
                found.append(Table(title.format(CROPPING), difference_table(own, "to_cropping", CROPPING)))
        elif task == "key_tokens":
            count = max(row["tokens"] for row in own)
            found.append(Table(f"Perplexity of the {count} key tokens, by position", perplexity_table(own)))
            title = f"Key tokens: difference to {CROPPING}, nats a token, 95% interval"
            found.append(Table(title, difference_table(own, "to_cropping", CROPPING)))
        elif task == "repeats":
            counts = {row["measure"]: row["tokens"] for row in own}
            title = (
                f"Perplexity beyond 1x of the {counts.get('repeats', 0):,} tokens that repeat what stood more than 1x "
                f"back, and of the {counts.get('others', 0):,} others"
            )
            found.append(Table(title, repeats_table(own, lambda row: perplexity_text(row["nll"]))))
            title = f"Repeats and others: difference to {CROPPING}, nats a token, 95% interval"
            text = repeats_table(own, lambda row: difference_text(row, "to_cropping"), CROPPING)
            found.append(Table(title, text))
        elif "context" in kinds:
            title = "Context gain: nats a token that more context than 1x saves on the same last tokens, 95% interval"
            found.append(Table(title, _by_length(own, "context", lambda row: difference_text(row, "gain"))))
            title = f"The same tokens: difference to {CROPPING}, nats a token, 95% interval"
            found.append(Table(title, _by_length(own, "context", lambda row: difference_text(row, "to_cropping"))))
        elif "protocol" in kinds:
            text = _by_length(own, "protocol", lambda row: perplexity_text(row["nll"]))
            read = sum(row["tokens_read"] for row in own if row["method"] == UNPATCHED)
            found.append(Table(f"Perplexity by the protocol {task}, {read:,} tokens read a method", text))
        elif "harness" in kinds:
            for metric in dict.fromkeys(row["metric"] for row in own if row["metric"] != str(row["to"])):
                part = [row for row in own if row["metric"] == metric]
                title = f"{task}, {metric} ({_values(part, 'harness')}), 95% interval"
                found.append(Table(title, _by_length(part, "harness", _score_text)))
            if part := [row for row in own if row["metric"] == str(row["to"])]:
                title = f"{task} ({_values(part, 'harness')}, a subset of RULER), 95% interval"
                found.append(Table(title, _by_length(part, "harness", _score_text)))
        elif "length" in kinds:
            found.append(Table(f"{task}: answers right, 95% interval", _by_length(own, "length", accuracy_text)))
            text = _by_length(own, "length", lambda row: f"{row['nll']:.2f}")
            found.append(Table(f"{task}: nats a token of the right answer", text))
    return found


def summary_table(rows: list[Row]) -> list[list[str]]:
    """Header and one line a method: what a reader wants to know first."""
    summary = summarise(rows)
    trained = rows[0]["trained_length"]
    retrieval = sorted({task for one in summary.values() for task in one.accuracy})
    gains = any(one.context_gain is not None for one in summary.values())
    longest = length_name(rows[0]["lengths"][-1], trained)
    header = ["method", "usable length", "tax below 1x, nats", f"to cropping at {longest}, nats"]
    repeats = any(one.repeats is not None for one in summary.values())
    header += ["context gain, nats"] * gains + ["far repeats to cropping, nats"] * repeats
    header += [f"{task} at {longest}" for task in retrieval]
    lines = [header]
    for method, one in summary.items():
        cells = [method, "", "", ""]
        if one.usable_length is not None:
            low, high = one.usable_length["usable_length_low"], one.usable_length["usable_length_high"]
            cells[1] = length_name(one.usable_length["usable_length"], trained)
            cells[1] += "" if low is None else f" [{length_name(low, trained)},{length_name(high, trained)}]"
        cells[2] = "" if one.tax is None else difference_text(one.tax)
        if one.far is not None and "to_cropping" in one.far:
            cells[3] = difference_text(one.far, "to_cropping")
        cells += [difference_text(one.context_gain, "gain") if one.context_gain else ""] * gains
        cells += [difference_text(one.repeats, "to_cropping") if one.repeats else ""] * repeats
        cells += [accuracy_text(one.accuracy[task]) if task in one.accuracy else "" for task in retrieval]
        lines.append(cells)
    return lines


def conditions(rows: list[Row]) -> str:
    """One line that says under which conditions the numbers hold; where rows differ, which methods have which."""
    row = rows[0]
    packages = sorted({name for row in rows for name in row["versions"]})
    versions = ", ".join(f"{name} {_values(rows, 'versions', name)}" for name in packages)
    counted = [r for r in rows if "documents" in r]
    if counted:
        most = max(counted, key=lambda r: r["documents"])
        read = f"{most['documents']} documents of {row['data']} ({most['documents_sha256']})"
    else:
        read = f"text of {row['data']}"
    return (
        f"{row['model']}, trained length {row['trained_length']}, factor {row['factor']:g}, {read}, "
        f"{row['dtype']} on {_values(rows, 'device')}, chunks of "
        f"{_values(rows, 'chunk_size')} tokens; {versions}"
    )


def _values(rows: list[Row], *keys: str) -> str:
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


def markdown_tables(rows: list[Row]) -> str:
    """All tables in Markdown, with their conditions under them."""
    texts = []
    for table in tables(rows):
        lines = ["| " + " | ".join(cells) + " |" for cells in table.lines]
        rule = "|" + " --- |" + " ---: |" * (len(table.lines[0]) - 1)
        texts += [f"{table.title}:", "", lines[0], rule, *lines[1:], ""]
    return "\n".join([*texts, f"{conditions(rows)}.", ""])


def print_tables(rows: list[Row], console: Any) -> None:
    """All tables in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Printed

    for table in tables(rows):
        title: str | None = table.title
        for lines in _parts(table.lines, console.width):
            printed = Printed(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
            for index, column in enumerate(zip(*lines, strict=True)):
                name = "\n".join(textwrap.wrap(column[0], _width(column)))
                printed.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
            for cells in lines[1:]:
                printed.add_row(*cells, style="bold" if cells[0] in (UNPATCHED, CROPPING) else None)
            console.print(printed)
            console.print()
            title = None
    console.print(f"{conditions(rows)}.")


def _parts(lines: list[list[str]], width: int) -> list[list[list[str]]]:
    """A table as several that fit the width, each with the first column; headers may wrap, cells not."""
    widths = [_width(cells) for cells in zip(*lines, strict=True)]
    parts, used = [[0]], widths[0]
    for column in range(1, len(widths)):
        if used + widths[column] + 1 > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(column)
        used += widths[column] + 1
    return [[[cells[column] for column in part] for cells in lines] for part in parts]


def _width(cells: Sequence[str]) -> int:
    """What a column takes if its header wraps."""
    return max(map(len, [*cells[0].split(), *cells[1:]]), default=1)
