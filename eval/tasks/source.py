"""Where the texts of a run come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rope_scaling.eval.documents import Documents, make_documents


@dataclass
class Source:
    """Where a run's texts come from."""

    texts: Callable[[], Iterable[tuple[str, str]]]
    """Gives names and texts, again at every call."""
    tokenizer: Any
    pieces: bool = False
    """Cut texts into as many documents of the longest length as they hold."""
    max_documents: int | None = None
    folder: Path | None = None
    """Where tasks keep what is expensive to prepare, each in the sub-folder `Task.keeps`."""
    fresh: bool = False
    """Measure again what the folder keeps."""
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
