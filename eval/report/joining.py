"""Runs of one model, setting and texts, put together for one table; runs that do not belong together are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.files import Row
from rope_scaling.eval.report.reading import Run, read_run


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
        joined = next((earlier for earlier in runs if not _differences(earlier, run)), None)
        if joined is None:
            if runs and not mixed:
                raise RopeScalingError(
                    f"{str(run.folders[0])!r} and {str(runs[0].folders[0])!r} cannot share a table: they differ in "
                    f"{', '.join(_differences(runs[0], run))}. Give `--mixed` for a section each."
                )
            runs.append(run)
        else:
            _join(joined, run)
    return runs


def _differences(run: Run, other: Run) -> list[str]:
    first, second = run.rows[0], other.rows[0]
    known = [key for key in _SAME if key in first and key in second]
    differences = [f"{key} ({first[key]} and {second[key]})" for key in known if first[key] != second[key]]
    texts = [{row["task"]: row["documents_sha256"] for row in part.rows} for part in (run, other)]
    shared = texts[0].keys() & texts[1].keys()
    return differences + [f"the texts of {task}" for task in shared if texts[0][task] != texts[1][task]]


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
        if (known := first.get(row["method"])) is not None:
            hashes = {known.get("method_sha256", ""), row.get("method_sha256", "")} - {""}
            # Another version may compute a hash otherwise.
            if known["in_effect"] != row["in_effect"] or (len(hashes) > 1 and known["versions"] == row["versions"]):
                return row["method"]
    return None


def _agree(row: Row, other: Row) -> bool:
    """Whether two rows of one measurement say the same, but for how machines round."""
    if row.keys() - _ORIGIN != other.keys() - _ORIGIN:
        return False
    pairs = [(row[key], other[key]) for key in row.keys() - _ORIGIN]
    return all(abs(a - b) <= _ROUNDING if isinstance(a, float) and isinstance(b, float) else a == b for a, b in pairs)
