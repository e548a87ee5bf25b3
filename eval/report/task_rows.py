"""Which task shows which rows."""

from __future__ import annotations

from dataclasses import dataclass

from rope_scaling.eval.files import Row
from rope_scaling.eval.lm_eval.task import HarnessTask
from rope_scaling.eval.tasks import TASKS, Task


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task, of all methods, and the class that shows them."""

    task: str
    shown_by: type[Task]
    rows: list[Row]


def rows_by_task(rows: list[Row]) -> list[TaskRows]:
    """Rows of each task, in the order in which they come; those of tasks that nobody here knows are left out."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    classes = ((name, task_class(own), own) for name, own in tasks.items())
    return [TaskRows(name, shown_by, own) for name, shown_by, own in classes if shown_by is not None]


def task_class(rows: list[Row]) -> type[Task] | None:
    """The class of a task from its rows; the name alone does not tell, since lm-eval has tasks of the same names."""
    measures = {row["measure"] for row in rows}
    named = TASKS.get(rows[0]["task"])
    if named is not None and named.recognised_by in ("", *measures):
        return named
    return next((cls for cls in (*TASKS.values(), HarnessTask) if cls.recognised_by in measures), None)
