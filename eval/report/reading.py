"""A run read back from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.figures import png
from rope_scaling.eval.files import Row, read_rows
from rope_scaling.eval.formatting import Table
from rope_scaling.eval.report.distance_maps import map_figure
from rope_scaling.eval.report.task_rows import rows_by_task


class Plot(NamedTuple):
    """A picture as it is written."""

    name: str
    """Of its file, without the suffix."""
    data: bytes
    """A PNG."""
    alt: str
    """What it shows, in words."""


@dataclass
class Run:
    """Rows of one model under one setting, from one folder or several."""

    folders: list[Path]
    rows: list[Row]
    scores: dict[str, dict[str, list[np.ndarray]]] = field(default_factory=dict)
    """Of tasks that draw them: by task, then by method, one array an item."""
    costs: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model's name and its setting."""
        row = self.rows[0]
        return f"{row['model']}, factor {row['factor']:g}"

    def plots(self) -> Iterator[Plot]:
        """Figures of the tasks: those drawn from scores first, then task by task in the order of the rows."""
        for task in sorted(rows_by_task(self.rows), key=lambda task: not task.shown_by.draws_scores):
            for name, figure, alt in task.shown_by.pictures(task.rows, self.scores.get(task.task, {})):
                yield Plot(name, png(figure), alt)

    def maps(self) -> Iterator[Plot]:
        """Heat maps of relative positions, one per method that changes them."""
        done = set()
        for row in self.rows:
            if (method := row["method"]) not in done:
                done.add(method)
                figure = map_figure(method, row["arguments"], row["trained_length"], row["lengths"][-1])
                if figure is not None:
                    yield Plot(f"map-{_file_name(method)}", png(figure), f"map of {_file_name(method)}")

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
    """The rows of a run's folder, its costs, and the scores of tasks that draw them.

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
    for task in rows_by_task(rows):
        if task.shown_by.draws_scores:
            read = run.scores.setdefault(task.task, {})
            for row in task.rows:
                if row["method"] not in read and (scores := _scores(folder, row)):
                    read[row["method"]] = scores
    return run


def _scores(folder: Path, row: Row) -> list[np.ndarray]:
    """The scores that a row was made of, in the same order for every method; none if the folder holds rows only."""
    if "scores" in row:
        return [np.load(path) for path in sorted((folder / row["scores"]).glob("*.npy"))]
    path = folder / row["task"] / f"{_file_name(row['method'])}-{row['frequencies_sha256']}.npz"  # before format 2
    if not path.exists():
        return []
    with np.load(path) as stored:
        return [stored[name] for name in stored.files]


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in label)[:80]
