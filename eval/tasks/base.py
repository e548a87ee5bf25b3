"""What a task is: it makes items, scores a model on one of them, and turns scores into rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Documents, make_documents
from rope_scaling.eval.identity import tokenizer_sha256
from rope_scaling.eval.rows import hash_of


Row = dict[str, Any]


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


@dataclass
class Source:
    """Where a run's texts come from."""

    texts: Callable[[], Iterable[tuple[str, str]]]
    """Gives names and texts, anew at every call."""
    tokenizer: Any
    pieces: bool = False
    """Cut texts into as many documents of the longest length as they hold."""
    max_documents: int | None = None
    folder: Path | None = None
    """The run's output folder, for what is worth keeping besides scores."""
    fresh: bool = False
    """Measure anew what the folder keeps."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What tasks of one run make once and share, by name."""
    _documents: dict[tuple[int, ...], Documents] = field(default_factory=dict)

    def documents(self, lengths: list[int]) -> Documents:
        """The texts as documents of at least the shortest and at most the longest length."""
        key = tuple(lengths)
        if key not in self._documents:
            self._documents[key] = make_documents(
                self.texts(), self.tokenizer, lengths, pieces=self.pieces, max_documents=self.max_documents
            )
        return self._documents[key]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def bos(self) -> list[int]:
        """The BOS as a list, empty if the tokenizer has none."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task; its fields are settings, from a suite's file or the command line."""

    name: ClassVar[str]
    about: ClassVar[str]
    """What it measures, in a line."""
    skipped_because: ClassVar[str] = "were shorter than the shortest length"
    """Of texts that do not fit, for the user."""

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
    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Any], int]:
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


@dataclass(frozen=True)
class Scores:
    """Scores of one method and of the two baselines, one array an item."""

    own: list[np.ndarray]
    unpatched: list[np.ndarray]
    cropping: list[np.ndarray]


@dataclass(frozen=True)
class Work:
    """A task with its items."""

    task: Task
    items: Sequence[Any]
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
    return [Work(task, *task.items(source, config, model), tokenizer) for task in tasks]
