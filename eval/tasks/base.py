"""What a task is: it makes items, scores a model on one of them, makes rows of scores, and shows rows.

A task of your own is a subclass of `Task` or of a kind of task (`CurveTask`, `PromptTask`, `RetrievalTask`); a line in
`TASKS` makes it known to the command line, suites and reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table
from rope_scaling.eval.tasks.source import Source


class Item(Protocol):
    """What is scored at once: a document, or prompts that share a text. The unit of every interval."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def sha256(self) -> str:
        """Hash of everything that is scored, 16 hexadecimal digits."""

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""


@dataclass(frozen=True)
class Scores:
    """Scores of one method and of the two baselines, one array an item."""

    own: list[np.ndarray]
    unpatched: list[np.ndarray]
    cropping: list[np.ndarray]


class Picture(NamedTuple):
    """A figure of a report."""

    name: str
    """Of its file, without the suffix."""
    figure: Any
    """One of Matplotlib's."""
    alt: str
    """What it shows, in words."""


@dataclass(frozen=True)
class SummaryEntry:
    """A number that a reader wants to know first of a method, by the name that conditions of a report use."""

    name: str
    value: float | None
    """`None` if the rows do not have it."""
    heading: str = ""
    """Of its column in the summary, where `{longest}` is the longest length; empty for no column."""
    text: str = ""
    """Of its cell."""
    note: str = ""
    """An explanation of the column, for those whose heading is not enough."""

    @classmethod
    def of(
        cls,
        rows: list[Row],
        name: str,
        field: str,
        heading: str = "",
        text: Callable[[Row], str] = lambda row: "",
        note: str = "",
    ) -> SummaryEntry:
        """The entry for `field` of the last of some rows; its value is `None` if there are no rows."""
        if not rows:
            return cls(name, None, heading, "", note)
        return cls(name, rows[-1][field], heading, text(rows[-1]), note)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are settings, from a suite's file or the command line.

    Its class methods present rows as they are on disk, all of one task; a report has no instance of the task.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    """What it measures, in a line."""
    skipped_because: ClassVar[str] = "were shorter than the shortest length"
    """Of texts that do not fit, for the user."""
    keeps: ClassVar[str] = ""
    """Sub-folder of `Source.folder` in which `items` keeps what is expensive to make."""
    recognised_by: ClassVar[str] = ""
    """Value of `measure` by which a report recognises rows of this kind of task under any name; if empty, the rows are
    recognised by the task's name alone."""
    place: ClassVar[int] = 3
    """Order of its columns in the summary; tasks of equal place are ordered by name."""
    draws_scores: ClassVar[bool] = False
    """Whether `pictures` takes scores beside rows."""

    def stored_as(self, config: EvaluationConfig) -> str:
        """Under which name scores are stored: tasks that need the same scores of the same items share one."""
        return self.name

    def settings(self) -> dict[str, Any]:
        """Settings that change rows, as plain data."""
        return dict(vars(self))

    def scored_with(self) -> dict[str, Any]:
        """What scores depend on beside model, method, item and lengths: scores found again are those of the same."""
        return self.settings()

    @abstractmethod
    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Item], int]:
        """What will be scored, and how many texts did not fit (`skipped_because`).

        Raises:
            RopeScalingError: no text is long enough, or a setting does not go with the lengths.
        """

    @abstractmethod
    def score(self, model: Any, item: Any, config: EvaluationConfig) -> np.ndarray:
        """Scores of one item, an array of numbers that `rows` understands."""

    @abstractmethod
    def score_cropped(self, model: Any, item: Any, plain: np.ndarray, config: EvaluationConfig) -> np.ndarray:
        """The cropping baseline: scores of the unpatched model given only what fits in its trained length.

        `plain` are its scores with the whole text.
        """

    @abstractmethod
    def rows(self, items: Sequence[Any], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """Measurements of one method."""

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Tables of all methods."""
        return []

    @classmethod
    def pictures(cls, rows: list[Row], scores: Mapping[str, list[np.ndarray]]) -> Iterator[Picture]:
        """Figures of all methods.

        Args:
            rows (list of `dict`): Rows of the task.
            scores (mapping of label to list of `np.ndarray`): Of each method, one array an item; empty unless
                `draws_scores`, or if the folder holds rows only.
        """
        yield from ()

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """What a reader wants to know first, of one method; entries and their columns are the same for all methods."""
        return []
