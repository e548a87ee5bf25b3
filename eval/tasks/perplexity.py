"""Loss by position of the token, from one pass over each document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.intervals import usable_length
from rope_scaling.eval.perplexity import cropped_nll_curve, nll_curve
from rope_scaling.eval.rows import measure, position_buckets
from rope_scaling.eval.tasks.base import Row, Scores, Source, Task


@dataclass(frozen=True, kw_only=True)
class CurveTask(Task):
    """A task whose scores are a document's curve: the loss at every position, `[T - 1]`."""

    def stored_as(self, config: EvaluationConfig) -> str:
        """All of these share their curves."""
        return "perplexity"

    def scored_with(self) -> dict[str, Any]:
        """Nothing: settings decide what is made of the curves."""
        return {}

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Document], int]:
        """Documents of at least the shortest length, cut at the longest."""
        documents = source.documents(config.lengths)
        return documents.items, documents.skipped

    def score(self, model: Any, item: Document, config: EvaluationConfig) -> np.ndarray:
        """The curve of one chunked pass."""
        return nll_curve(model, item.ids[None], config.chunk_size)[0].numpy()

    def score_cropped(self, model: Any, item: Document, plain: np.ndarray, config: EvaluationConfig) -> np.ndarray:
        """The curve with half to all of the trained length before each token."""
        curve = torch.from_numpy(plain)
        return cropped_nll_curve(model, item.ids, curve, config.trained_length, config.chunk_size).numpy()


@dataclass(frozen=True, kw_only=True)
class Perplexity(CurveTask):
    """Loss in buckets of positions and over prefixes, and the usable length that follows."""

    name: ClassVar[str] = "perplexity"
    about: ClassVar[str] = "loss by position, the usable length, and the tax below 1x"

    tolerance: float = 0.05
    """Nats a token by which a bucket may lie above the unpatched model's just below 1x, to count as usable."""

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a bucket, a row a prefix, and the usable length."""
        lengths, trained = config.lengths, config.trained_length
        rows = measure(scores.own, scores.unpatched, lengths, trained, config.seed, cropping=scores.cropping)
        return rows + self._usable(scores, config)

    def _usable(self, scores: Scores, config: EvaluationConfig) -> list[Row]:
        """The longest length whose last bucket, and those of all shorter ones from 1x on, are within the tolerance."""
        trained = config.trained_length
        buckets = [bucket for bucket in position_buckets(config.lengths, trained) if bucket[1] >= trained]
        if not buckets or buckets[0][1] != trained:
            return []
        sums, counts = zip(*(_sums(scores.own, bucket) for bucket in buckets), strict=True)
        reference = np.stack(_sums(scores.unpatched, buckets[0]))
        reached = usable_length(sums, counts, reference, self.tolerance, config.seed)
        ends = [0, *(end for _, end in buckets)]
        low, high = (None if count is None else ends[count] for count in reached[1:])
        length = ends[reached[0]]
        return [
            {
                "measure": "usable_length",
                "tolerance": self.tolerance,
                "usable_length": length,
                "usable_length_low": low,
                "usable_length_high": high,
                "documents": len(scores.own),
            }
        ]


def _sums(curves: list[np.ndarray], bucket: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each document in a bucket of positions, both 0 where the document ends inside it."""
    start, end = max(bucket[0] - 1, 0), bucket[1] - 1
    whole = [curve[start:end] if len(curve) >= end else curve[:0] for curve in curves]
    return np.array([part.sum(dtype=np.float64) for part in whole]), np.array([float(len(part)) for part in whole])
