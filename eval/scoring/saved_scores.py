"""Scores on disk, one file an item."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rope_scaling.eval.files import write_array


class SavedScores:
    """The scores of one method on the items of one task: a file per item, named by the hash of the item."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.scores: dict[str, np.ndarray] = {}
        if folder is not None and folder.exists():
            self.scores = {path.stem: np.load(path) for path in folder.glob("*.npy")}
        self.found = set(self.scores)
        """Items that an earlier run scored."""

    def add(self, item: str, values: np.ndarray) -> None:
        """Keeps the scores of one item, on disk before anything else is measured."""
        self.scores[item] = values
        if self.folder is not None:
            write_array(self.folder / f"{item}.npy", values)
