"""Tables of a run, made from rows alone: the summary, those of its tasks, and the conditions under which they hold."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, length_name, markdown, values_text
from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.report.summary import summary_entries
from rope_scaling.eval.report.task_rows import rows_by_task


_SUMMARISED = "usable_length"
"""Without this number of any method, there is no summary."""


def tables(rows: list[Row]) -> list[Table]:
    """Every table that rows of one model hold, the summary first."""
    summary, others = summary_table(rows), task_tables(rows)
    return others if summary is None else [summary, *others]


def task_tables(rows: list[Row]) -> list[Table]:
    """The tables of each task, in the order of the rows."""
    return [table for task in rows_by_task(rows) for table in task.shown_by.tables(task.rows)]


def summary_table(rows: list[Row]) -> Table | None:
    """What a reader wants to know first, one line per method; `None` if no method has a usable length."""
    entries = summary_entries(rows)
    if not any(entry.name == _SUMMARISED and entry.value is not None for _, entry in entries):
        return None
    longest = length_name(rows[0]["lengths"][-1], rows[0]["trained_length"])
    headings = dict.fromkeys(entry.heading for _, entry in entries if entry.heading)
    cells = {(method, entry.heading): entry.text for method, entry in entries}
    methods = dict.fromkeys(row["method"] for row in rows)
    header = ["method", *(heading.format(longest=longest) for heading in headings)]
    lines = [[method, *(cells.get((method, heading), "") for heading in headings)] for method in methods]
    return Table("Summary", [header, *lines])


def summary_notes(rows: list[Row]) -> list[str]:
    """What columns of the summary say, where their headings alone do not."""
    return list(dict.fromkeys(entry.note for _, entry in summary_entries(rows) if entry.note))


def conditions(rows: list[Row]) -> str:
    """One line that says under which conditions the numbers hold; where rows differ, which methods have which."""
    row = rows[0]
    packages = sorted({name for row in rows for name in row["versions"]})
    versions = ", ".join(f"{name} {values_text(rows, 'versions', name)}" for name in packages)
    counted = [r for r in rows if "documents" in r]
    if counted:
        most = max(counted, key=lambda r: r["documents"])
        read = f"{most['documents']} documents of {row['data']} ({most['documents_sha256']})"
    else:
        read = f"text of {row['data']}"
    return (
        f"{row['model']}, trained length {row['trained_length']}, factor {row['factor']:g}, {read}, "
        f"{row['dtype']} on {values_text(rows, 'device')}, chunks of "
        f"{values_text(rows, 'chunk_size')} tokens; {versions}"
    )


def markdown_tables(rows: list[Row]) -> str:
    """All tables in Markdown, with their conditions under them."""
    texts = []
    for table in tables(rows):
        texts += [f"{table.title}:", "", *markdown(table.lines), ""]
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
