"""Runs read back from their folders, and several put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.figures import png
from rope_scaling.eval.files import Row, read_rows
from rope_scaling.eval.formatting import Table
from rope_scaling.eval.report.distance_maps import map_figure
from rope_scaling.eval.report.task_rows import rows_by_task


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
    for task, scores in other.scores.items():
        run.scores[task] = scores | run.scores.get(task, {})
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


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in label)[:80]
