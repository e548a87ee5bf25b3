"""`rope-scaling report`: rows of one or several runs as one self-contained page, Markdown, CSV and pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.maps import map_figure
from rope_scaling.eval.plots import curves_figure, heat_figure, lengths_figure, png
from rope_scaling.eval.report import (
    Row,
    Table,
    conditions,
    markdown_tables,
    tables,
)
from rope_scaling.eval.rows import read_rows, write_atomically


_SAME = ("model", "weights_sha256", "trained_length", "dtype", "factor")
"""Rows that differ in these are not shown in one table; rows of earlier versions lack hashes."""
_MEASUREMENT = ("task", "method", "measure", "metric", "from", "to", "depth")
"""Rows that are equal in these hold the same measurement."""
_ORIGIN = {
    "schema",
    "versions",
    "harness",
    "weights_sha256",
    "tokenizer_sha256",
    "method_sha256",
    "scores",
    "settings",
}
"""What rows say of where they come from, in which two rows of one measurement may differ."""
_ROUNDING = 0.01
"""Nats a token, or share, by which the same measurement may come out otherwise on another processor."""


@dataclass
class Run:
    """Rows of one model under one setting, from one folder or several."""

    folders: list[Path]
    rows: list[Row]
    curves: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Loss at every position by method, for the perplexity task."""
    costs: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model's name and its setting."""
        row = self.rows[0]
        return f"{row['model']}, factor {row['factor']:g}"

    def of(self, task: str, measure: str) -> list[Row]:
        """Rows of a task and a kind."""
        return [row for row in self.rows if row["task"] == task and row["measure"] == measure]

    def plots(self) -> Iterator[tuple[str, bytes]]:
        """Names and PNGs."""
        trained = self.rows[0]["trained_length"]
        if self.curves:
            yield "curves", png(curves_figure(self.curves, trained, f"Loss by position: {self.rows[0]['model']}"))
        for task in dict.fromkeys(row["task"] for row in self.rows):
            if rows := self.of(task, "context"):
                title = "Nats a token that context beyond 1x saves on the same last tokens"
                yield task, png(lengths_figure(rows, "gain", trained, title, "gain over 1x, nats a token"))
            if rows := self.of(task, "length"):
                title = f"{task}: share of answers right, with 95% intervals"
                yield task, png(lengths_figure(rows, "accuracy", trained, title, "share of answers right"))
            if rows := self.of(task, "cell"):
                yield f"{task}_depths", png(heat_figure(rows, trained, f"{task}: answers found, by length and depth"))

    def maps(self) -> Iterator[tuple[str, bytes]]:
        """Pictures of how far away each method lets keys seem."""
        done = set()
        for row in self.rows:
            if row["method"] not in done:
                done.add(row["method"])
                figure = map_figure(row["method"], row["arguments"], row["trained_length"], row["lengths"][-1])
                if figure is not None:
                    yield f"map-{_file_name(row['method'])}", png(figure)

    def published(self) -> list[Table]:
        """Numbers that papers give for this model by a protocol that was run here."""
        model = self.rows[0]["model"].rpartition("/")[2].lower()
        ours = {row["task"] for row in self.rows}
        found: dict[tuple[str, str], list[Row]] = {}
        for row in published_rows():
            if model in row["models"] and row["protocol"] in ours:
                found.setdefault((row["protocol"], f"{row['data']}, {row['source']}"), []).append(row)
        result = []
        for (protocol, where), rows in found.items():
            lengths = sorted({length for row in rows for length in map(int, row["perplexity"])})
            lines = [["method", *(f"{length}" for length in lengths)]]
            lines += [[row["method"], *(str(row["perplexity"].get(str(n), "")) for n in lengths)] for row in rows]
            result.append(Table(f"Published, not measured here: {protocol} on {where}", lines))
        return result

    def cost_table(self) -> Table | None:
        """Seconds and speed of each method and task."""
        if not self.costs:
            return None
        lines = [["method", "task", "tokens", "seconds", "tokens a second"]]
        for key in dict.fromkeys((cost["method"], cost["task"]) for cost in self.costs):
            own = [cost for cost in self.costs if (cost["method"], cost["task"]) == key]
            tokens, seconds = (sum(cost[name] for cost in own) for name in ("tokens", "seconds"))
            speed = f"{tokens / seconds:,.0f}" if seconds else ""
            lines.append([*key, f"{tokens:,}", f"{seconds:,.1f}", speed])
        return Table("Cost of what was measured", lines)


def read_run(folder: Path) -> Run:
    """The rows and curves in a run's folder.

    Raises:
        RopeScalingError: there are none, or they are not of an evaluation.
    """
    try:
        rows = read_rows(folder / "rows.jsonl")
    except OSError as error:
        raise RopeScalingError(
            f"{str(folder)!r} holds no finished run: no `rows.jsonl` there ({error.strerror}). Give folders that "
            "`rope-scaling evaluate` wrote."
        ) from None
    except ValueError as error:
        raise RopeScalingError(f"`rows.jsonl` in {str(folder)!r} is not made of JSON lines: {error}.") from None
    if not rows or any("method" not in row or "measure" not in row or row.get("task") == "finetune" for row in rows):
        raise RopeScalingError(f"The rows in {str(folder)!r} are not those of `rope-scaling evaluate`.")
    run = Run([folder], rows)
    costs = folder / "costs.jsonl"
    run.costs = read_rows(costs) if costs.exists() else []
    for row in rows:
        if row["task"] == "perplexity" and row["method"] not in run.curves and (curves := _curves(folder, row)):
            run.curves[row["method"]] = curves
    return run


def _curves(folder: Path, row: Row) -> list[np.ndarray]:
    """The scores that a row was made of, in the same order for every method; none if the folder holds rows only."""
    if "scores" in row:
        return [np.load(path) for path in sorted((folder / row["scores"]).glob("*.npy"))]
    path = folder / "perplexity" / f"{_file_name(row['method'])}-{row['frequencies_sha256']}.npz"  # before format 2
    if not path.exists():
        return []
    with np.load(path) as stored:
        return [stored[name] for name in stored.files]


def read_runs(folders: list[Path], *, mixed: bool = False) -> list[Run]:
    """Runs from folders; those of one model, setting and texts are put together.

    Args:
        folders (list of `Path`): What `rope-scaling evaluate` wrote.
        mixed (`bool`): Allow several models or settings, each of which then gets its own tables.

    Raises:
        RopeScalingError: rows differ in model, setting or texts and `mixed` is not set, or two rows of one
            measurement differ.
    """
    runs: list[Run] = []
    for run in map(read_run, folders):
        same = next((one for one in runs if _differences(one, run) == []), None)
        if same is None:
            if runs and not mixed:
                raise RopeScalingError(
                    f"{str(run.folders[0])!r} and {str(runs[0].folders[0])!r} make no common table: they differ in "
                    f"{', '.join(_differences(runs[0], run))}. Give `--mixed` for a section each."
                )
            runs.append(run)
        else:
            _join(same, run)
    return runs


def _differences(one: Run, other: Run) -> list[str]:
    first, second = one.rows[0], other.rows[0]
    known = [key for key in _SAME if key in first and key in second]
    found = [f"{key} ({first[key]} and {second[key]})" for key in known if first[key] != second[key]]
    texts = [{row["task"]: row["documents_sha256"] for row in run.rows} for run in (one, other)]
    found += [f"the texts of {task}" for task in texts[0].keys() & texts[1].keys() if texts[0][task] != texts[1][task]]
    return found


def _join(run: Run, other: Run) -> None:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in _MEASUREMENT)

    if other_method := _redefined(run.rows, other.rows):
        raise RopeScalingError(
            f"{str(other.folders[0])!r} and {str(run.folders[0])!r} call different methods {other_method!r}. Report "
            "them apart."
        )
    known = {key(row): row for row in run.rows}
    for row in other.rows:
        old = known.get(key(row))
        if old is None:
            run.rows.append(row)
        elif not _agree(old, row):
            raise RopeScalingError(
                f"{str(other.folders[0])!r} and {str(run.folders[0])!r} give {row['method']!r} in {row['task']!r} "
                "different numbers on the same texts. Report them apart."
            )
    run.folders += other.folders
    run.curves = {**other.curves, **run.curves}
    run.costs += other.costs


def _redefined(rows: list[Row], others: list[Row]) -> str | None:
    """The first label under which two runs evaluated different methods."""
    first = {row["method"]: row for row in rows}
    for row in others:
        if (one := first.get(row["method"])) is not None:
            hashes = {one.get("method_sha256", ""), row.get("method_sha256", "")} - {""}
            # Another version may compute a hash otherwise.
            if one["in_effect"] != row["in_effect"] or (len(hashes) > 1 and one["versions"] == row["versions"]):
                return row["method"]
    return None


def _agree(one: Row, other: Row) -> bool:
    """Whether two rows of one measurement say the same, but for how machines round."""
    if one.keys() - _ORIGIN != other.keys() - _ORIGIN:
        return False
    pairs = [(one[key], other[key]) for key in one.keys() - _ORIGIN]
    return all(abs(a - b) <= _ROUNDING if isinstance(a, float) and isinstance(b, float) else a == b for a, b in pairs)


def write_report(runs: list[Run], output: Path) -> None:
    """Writes `report.html`, which holds everything, and beside it `report.md`, `rows.csv` and the pictures."""
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for index, run in enumerate(runs):
        prefix = f"{index + 1}-" if len(runs) > 1 else ""
        pictures = [(name, data, _ALT.get(name, name.replace("_", " "))) for name, data in run.plots()]
        maps = [(name, data, name.replace("map-", "map of ")) for name, data in run.maps()]
        for name, data, _ in [*pictures, *maps]:
            write_atomically(output / f"{prefix}{name}.png", data)
        found = tables(run.rows)
        summary = [table for table in found if table.title == "Summary"]
        cost = run.cost_table()
        sections.append(
            {
                "title": run.title,
                "summary": summary,
                "tables": [table for table in found if table not in summary],
                "published": run.published(),
                "pictures": [(base64.b64encode(data).decode(), text) for _, data, text in pictures],
                "maps": [(base64.b64encode(data).decode(), text) for _, data, text in maps],
                "cost": [cost] if cost else [],
                "conditions": conditions(run.rows),
                "provenance": _provenance(run),
            }
        )
    write_atomically(output / "report.html", _html(sections).encode())
    texts = [f"# {run.title}\n\n{markdown_tables(run.rows)}" for run in runs]
    write_atomically(output / "report.md", "\n".join(texts).encode())
    write_atomically(output / "rows.csv", _csv([row for run in runs for row in run.rows]).encode())


_ALT = {
    "curves": "loss by position, one line a method",
    "context_gain": "gain from context beyond the trained length",
}


def _html(sections: list[dict[str, Any]]) -> str:
    from jinja2 import Environment

    text = (resources.files("rope_scaling.eval") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(sections=sections)


def _csv(rows: list[Row]) -> str:
    """Plain columns; what is nested stands in its cell as JSON."""
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


def published_rows() -> list[Row]:
    """Numbers from papers, one JSON object a line of their tables."""
    text = (resources.files("rope_scaling.eval") / "published.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in label)[:80]
