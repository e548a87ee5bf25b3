"""Suites: lists of tasks with their settings, as strict YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.eval.tasks import TASKS, Task
from rope_scaling.notation import read_fields
from rope_scaling.strict import sentence, yaml_mapping


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    files = resources.files("rope_scaling.eval").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_suite(name: str) -> list[Task]:
    """The tasks of a suite, by name or from a YAML file that maps names of tasks to their settings.

    Raises:
        RopeScalingError: there is no such suite, a task or a setting of one is not known, or has the wrong type.
    """
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise RopeScalingError(f"Cannot read the suite {name!r}: {error.strerror}.") from None
    elif name not in suite_names():
        raise unknown_name("suite", name, suite_names())
    else:
        text = (resources.files("rope_scaling.eval") / f"{name}.yaml").read_text(encoding="utf-8")
    return [make_task(task, settings or {}) for task, settings in yaml_mapping(name, text).items()]


def parse_task(text: str) -> Task:
    """Reads `name`, `name:field=value,field=value`, or `name:{...}` with a JSON object of fields.

    Raises:
        RopeScalingError: as `make_task`, or what follows the name is in neither form.
    """
    name, _, rest = text.partition(":")
    return make_task(name, read_fields(text, rest))


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """A task by name.

    Raises:
        RopeScalingError: the name or a setting is not known, or a setting has the wrong type.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    if not isinstance(settings, Mapping):
        raise RopeScalingError(f"The settings of the task {name!r} must be a mapping of fields; got {settings!r}.")
    cls = with_config(ConfigDict(extra="forbid"))(TASKS[name])
    try:
        return TypeAdapter(cls).validate_python(dict(settings))
    except ValidationError as error:
        details = error.errors()[:3]
        raise RopeScalingError(" ".join(sentence(detail, f"task {name!r}", cls) for detail in details)) from None


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises `RopeScalingError` if there is no task, or one is there twice."""
    names = [task.name for task in tasks]
    if not names:
        raise RopeScalingError("There is no task to evaluate. Give `--task` or `--suite`.")
    if twice := {name for name in names if names.count(name) > 1}:
        raise RopeScalingError(f"Each task can be listed only once; given twice: {', '.join(sorted(twice))}.")
