"""The output folder of a run: settings first, so that no run continues another's; rows when all of them are there."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.rows import environment, write_atomically, write_rows
from rope_scaling.eval.tasks.base import Row, Work


class SavedScores:
    """The scores of one method on disk, by hash of the item; rewritten whole and atomically."""

    def __init__(self, path: Path | None):
        self.path = path
        self.scores: dict[str, np.ndarray] = {}
        if path is not None and path.exists():
            with np.load(path) as stored:
                self.scores = dict(stored)

    def write(self) -> None:
        """Puts everything on disk."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self.scores)  # type: ignore[arg-type]
            write_atomically(self.path, buffer.getvalue())


class Store:
    """A folder that holds one run: `settings.json`, a folder of scores a task, `rows.jsonl`, `costs.jsonl`.

    More methods and more tasks may be added to it; everything else has to stay as it was.

    Raises:
        RopeScalingError: the folder holds another run or other files, or cannot be made.
    """

    def __init__(self, folder: Path | None, config: EvaluationConfig, work: list[Work]):
        self.folder = folder
        if folder is None:
            return
        settings = json.loads(json.dumps(run_settings(config, work)))
        recorded = folder / "settings.json"
        if recorded.exists():
            old = json.loads(recorded.read_text(encoding="utf-8"))
            self._compare(old, settings)
            settings["tasks"] = {**old.get("tasks", {}), **settings["tasks"]}
        elif folder.exists() and any(path.name not in _KEPT for path in folder.iterdir()):
            raise RopeScalingError(
                f"The output folder {str(folder)!r} exists and holds other files. Give a new or empty one."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RopeScalingError(f"Cannot make the output folder {str(folder)!r}: {error}") from error
        write_atomically(recorded, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        pairs = [(key, old.get(key), new.get(key)) for key in sorted((old.keys() | new.keys()) - {"tasks"})]
        for task in sorted(old.get("tasks", {}).keys() & new["tasks"].keys()):
            there, here = old["tasks"][task], new["tasks"][task]
            # `items` says the same as `documents_sha256`, at length.
            pairs += [(f"{task}.{key}", there.get(key), here.get(key)) for key in here if key != "items"]
        different = [f"{key} (there {there!r}, now {here!r})" for key, there, here in pairs if there != here]
        if different:
            raise RopeScalingError(
                f"The output folder {str(self.folder)!r} holds rows of another run: {', '.join(different)}. Give "
                "another `--output`."
            )

    def open(self, name: str, label: str, frequencies: str) -> SavedScores:
        """Scores of a method: what is there already, and where to put the rest."""
        if self.folder is None:
            return SavedScores(None)
        safe = "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in label)[:80]
        return SavedScores(self.folder / name / f"{safe}-{frequencies}.npz")

    def finish(self, rows: list[Row], costs: list[Row]) -> None:
        """Rows of all tasks of this call, beside what earlier calls left of others; costs are added to those there."""
        if self.folder is None:
            return
        path = self.folder / "rows.jsonl"
        write_rows(path, [*_others(path, {row["task"] for row in rows}), *rows])
        path = self.folder / "costs.jsonl"
        done = path.read_text(encoding="utf-8") if path.exists() else ""
        added = "".join(json.dumps(row, sort_keys=True) + "\n" for row in costs)
        write_atomically(path, (done + added).encode())


_KEPT = {"key_tokens", "ruler"}
"""What preparing a run may have left before its settings are written."""


def _others(path: Path, tasks: set[str]) -> list[Row]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["task"] not in tasks]


def run_settings(config: EvaluationConfig, work: list[Work]) -> dict[str, Any]:
    """What has to be equal for two runs to give equal rows."""
    tasks = {
        one.task.name: {
            "settings": vars(one.task),
            "documents_sha256": one.sha256,
            "documents_skipped": one.skipped,
            "items": {item.name: item.sha256 for item in one.items},
        }
        for one in work
    }
    # Versions are part of the settings: scores of two versions must not meet in one table.
    return {**vars(config), "versions": environment(), "tasks": tasks}
