"""The output folder of a run: settings first, so that no run continues another's; rows when all of them are there."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.files import Row, read_rows, write_atomically, write_rows
from rope_scaling.eval.hashes import digest
from rope_scaling.eval.lm_eval.task import HarnessTask
from rope_scaling.eval.scoring.identity import environment
from rope_scaling.eval.scoring.saved_scores import SavedScores
from rope_scaling.eval.tasks import TASKS, Work


FORMAT = 2
"""Of the folder. Format 1 named scores by the label of a method, which does not say what they were measured with."""


class Store:
    """A folder that holds one run: `settings.json`, folders of scores, `rows.jsonl`, `costs.jsonl`.

    More methods and more tasks may be added to it; everything else has to stay as it was.

    Args:
        folder (`Path`, *optional*): The folder; without one, nothing is written.
        config (`EvaluationConfig`): Settings of the run, with the hash of its weights.
        work (list of `Work`): Tasks with their items.
        fresh (`bool`): Use no scores of an earlier run. One with other settings or weights is removed.

    Raises:
        RopeScalingError: the folder holds another run or other files, or cannot be made.
    """

    def __init__(self, folder: Path | None, config: EvaluationConfig, work: list[Work], fresh: bool = False):
        self.folder, self.config, self.fresh = folder, config, fresh
        self._opened: dict[str, SavedScores] = {}
        if folder is None:
            return
        settings = json.loads(json.dumps(run_settings(config, work)))
        recorded = folder / "settings.json"
        if recorded.exists():
            old = json.loads(recorded.read_text(encoding="utf-8"))
            if different := _differences(old, settings):
                if not fresh:
                    raise RopeScalingError(
                        f"The output folder {str(folder)!r} holds rows of another run: {', '.join(different)}. Give "
                        "another `--output`, or `--fresh` to remove that run and measure everything again."
                    )
                _remove(folder, old)
                old = {}
            settings["tasks"] = {**old.get("tasks", {}), **settings["tasks"]}
        elif folder.exists() and {path.name for path in folder.iterdir()} - _PREPARED:
            raise RopeScalingError(
                f"The output folder {str(folder)!r} exists and holds other files. Give a new or empty one."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RopeScalingError(f"Cannot make the output folder {str(folder)!r}: {error}") from error
        write_atomically(recorded, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())

    def open(self, part: Work, method: str, cropped: bool) -> tuple[str, SavedScores]:
        """The name of the scores of a task under a method, and those that are there already.

        Args:
            part (`Work`): The task with its items.
            method (`str`): What `method_sha256` gives.
            cropped (`bool`): Whether the scores are those of the cropping baseline.
        """
        stored_as, config = part.task.stored_as(self.config), self.config
        identity = {
            "weights": config.weights_sha256,
            "tokenizer": part.tokenizer_sha256,
            "method": method,
            "cropped": cropped,
            "task": [stored_as, part.task.scored_with()],
            "lengths": [config.trained_length, *config.lengths],
            "arithmetic": [config.dtype, config.device, config.chunk_size],
            "versions": environment(),
        }
        name = f"{stored_as}/{digest(identity)}"
        if name not in self._opened:
            folder = None if self.folder is None else self.folder / name
            if folder is not None:
                if self.fresh:
                    shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / "identity.json", (json.dumps(identity, indent=1) + "\n").encode())
            self._opened[name] = SavedScores(folder)
        return name, self._opened[name]

    def add_cost(self, cost: Row) -> None:
        """Appends what it took to score some items."""
        if self.folder is not None:
            with (self.folder / "costs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(cost, sort_keys=True) + "\n")

    def finish(self, rows: list[Row]) -> None:
        """Rows of this call in place of those of the same task and method, and beside all others."""
        if self.folder is None:
            return
        path = self.folder / "rows.jsonl"
        write_rows(path, _merged(read_rows(path) if path.exists() else [], rows))


_SAID = {"weights_sha256": "hash of the model's weights and config"}
"""What messages call some settings."""
_PREPARED = {task.keeps for task in (*TASKS.values(), HarnessTask)}
"""What preparing a run may have left before its settings are written."""


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps two runs from sharing a folder, in words."""
    if old.get("format") != new["format"]:
        return [f"it has format {old.get('format', 1)}, of another version of this library; this one writes {FORMAT}"]
    keys = sorted((old.keys() | new.keys()) - {"tasks"})
    pairs = [(_SAID.get(key, key), old.get(key), new.get(key)) for key in keys]
    for task in sorted(old.get("tasks", {}).keys() & new["tasks"].keys()):
        old_task, new_task = old["tasks"][task], new["tasks"][task]
        # `items` says the same as `documents_sha256`, at length.
        pairs += [(f"{task}.{key}", old_task.get(key), new_task.get(key)) for key in new_task if key != "items"]
    return [f"{key} (there {recorded!r}, now {given!r})" for key, recorded, given in pairs if recorded != given]


def _remove(folder: Path, settings: dict[str, Any]) -> None:
    """Removes the rows, costs and scores of a run, and nothing else."""
    stored = {recorded.get("stored_as", task) for task, recorded in settings.get("tasks", {}).items()}
    for name in stored:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("rows.jsonl", "costs.jsonl", "settings.json"):
        (folder / name).unlink(missing_ok=True)


def _merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows of two calls: by task, then by method, both in the order in which they came.

    Of a method that has changed under its label, rows that are not measured again are dropped, with a warning.
    """
    measured = {(row["task"], row["method"]) for row in new}
    now = {row["method"]: row["method_sha256"] for row in new}
    others = [row for row in old if (row["task"], row["method"]) not in measured]
    changed = [row for row in others if now.get(row["method"], row["method_sha256"]) != row["method_sha256"]]
    dropped = dict.fromkeys((row["task"], row["method"]) for row in changed)
    for task, method in dropped:
        warnings.warn(
            f"Removed the rows of {method!r} in {task!r}: {method!r} computes something else now. Evaluate {task!r} "
            "again.",
            stacklevel=2,
        )
    together = [row for row in others if (row["task"], row["method"]) not in dropped] + new
    tasks = list(dict.fromkeys(row["task"] for row in old + new))
    methods = list(dict.fromkeys(row["method"] for row in old + new))
    return sorted(together, key=lambda row: (tasks.index(row["task"]), methods.index(row["method"])))


def run_settings(config: EvaluationConfig, work: list[Work]) -> dict[str, Any]:
    """What has to be equal for two runs to give equal rows."""
    tasks = {
        part.task.name: {
            "settings": part.task.settings(),
            "scored_with": part.task.scored_with(),
            "stored_as": part.task.stored_as(config),
            "tokenizer_sha256": part.tokenizer_sha256,
            "documents_sha256": part.sha256,
            "documents_skipped": part.skipped,
            "items": {item.name: item.sha256 for item in part.items},
        }
        for part in work
    }
    # Versions are part of the settings: scores of two versions must not meet in one table.
    return {"format": FORMAT, **vars(config), "versions": environment(), "tasks": tasks}
