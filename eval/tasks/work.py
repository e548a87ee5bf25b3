"""Tasks with their items: what a run will score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.scoring.identity import tokenizer_sha256
from rope_scaling.eval.tasks.base import Item, Task
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True)
class Work:
    """A task with its items."""

    task: Task
    items: Sequence[Item]
    skipped: int = 0
    """Texts that did not fit; `Task.skipped_because` says why."""
    tokenizer_sha256: str = ""
    """Hash of the tokenizer that made the items."""

    @property
    def sha256(self) -> str:
        """Hash of all items, with what decides which of their scores count; 16 hexadecimal digits."""
        return hash_of("".join(getattr(item, "rows_sha256", item.sha256) for item in self.items).encode())


def prepare(tasks: Iterable[Task], source: Source, config: EvaluationConfig, model: Any) -> list[Work]:
    """The items of every task. Nothing has been measured yet when a task cannot be done."""
    tokenizer = tokenizer_sha256(source.tokenizer)
    made = ((task, *task.items(source, config, model)) for task in tasks)
    return [Work(task, items, skipped, tokenizer) for task, items, skipped in made]
