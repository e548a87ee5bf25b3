"""`rope-scaling report`: rows of one or several runs as one self-contained page, Markdown, CSV and pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

from rope_scaling.eval.files import Row, write_atomically
from rope_scaling.eval.report.published import published_tables
from rope_scaling.eval.report.reading import Run
from rope_scaling.eval.report.tables import conditions, markdown_tables, summary_notes, summary_table, task_tables


def write_report(runs: list[Run], output: Path) -> None:
    """Writes `report.html`, which holds everything, and beside it `report.md`, `rows.csv` and the pictures."""
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for index, run in enumerate(runs):
        prefix = f"{index + 1}-" if len(runs) > 1 else ""
        plots, maps = list(run.plots()), list(run.maps())
        for plot in [*plots, *maps]:
            write_atomically(output / f"{prefix}{plot.name}.png", plot.data)
        summary, cost = summary_table(run.rows), run.cost_table()
        sections.append(
            {
                "title": run.title,
                "summary": [summary] if summary else [],
                "notes": summary_notes(run.rows) if summary else [],
                "tables": task_tables(run.rows),
                "published": published_tables(run.rows),
                "pictures": [(base64.b64encode(plot.data).decode(), plot.alt) for plot in plots],
                "maps": [(base64.b64encode(plot.data).decode(), plot.alt) for plot in maps],
                "cost": [cost] if cost else [],
                "conditions": conditions(run.rows),
                "provenance": _provenance(run),
            }
        )
    write_atomically(output / "report.html", _html(sections).encode())
    texts = [f"# {run.title}\n\n{markdown_tables(run.rows)}" for run in runs]
    write_atomically(output / "report.md", "\n".join(texts).encode())
    write_atomically(output / "rows.csv", _csv([row for run in runs for row in run.rows]).encode())


def _html(sections: list[dict[str, Any]]) -> str:
    from jinja2 import Environment

    text = (resources.files("rope_scaling.eval.report") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(sections=sections)


def _csv(rows: list[Row]) -> str:
    """Plain columns; nested values are written as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return buffer.getvalue()


def _provenance(run: Run) -> list[tuple[str, str]]:
    """What else one needs to get the same numbers: texts, and the frequencies that were in effect."""
    texts = {row["task"]: row["documents_sha256"] for row in run.rows}
    lines = [(f"items of {task}", value) for task, value in texts.items()]
    for method in dict.fromkeys(row["method"] for row in run.rows):
        row = next(row for row in run.rows if row["method"] == method)
        lines.append((method, f"{row['in_effect']}, frequencies {row['frequencies_sha256']}"))
    return lines
