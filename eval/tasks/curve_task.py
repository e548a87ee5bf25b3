"""Tasks whose scores are a document's curve: the loss at every position, from one pass over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import (
    bucket_name,
    bucket_names,
    difference_text,
    perplexity_text,
    rows_by_method,
)
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.methods import UNPATCHED
from rope_scaling.eval.scoring.nll import cropped_nll_curve, nll_curve
from rope_scaling.eval.tasks.base import Task
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True)
class MaskedDocument(Document):
    """A document, and which of its tokens count."""

    mask: np.ndarray
    """`[T - 1]`, aligned with the document's curve."""

    @property
    def rows_sha256(self) -> str:
        """Hash of tokens and mask, 16 hexadecimal digits."""
        return hash_of(self.sha256.encode() + self.mask.tobytes())


def masked(documents: Sequence[Document], masks: Sequence[np.ndarray]) -> list[MaskedDocument]:
    """Documents with the masks of their tokens."""
    return [MaskedDocument(item.name, item.ids, mask) for item, mask in zip(documents, masks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class CurveTask(Task):
    """A task whose scores are a document's curve, `[T - 1]`, in nats."""

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


def perplexity_lines(rows: list[Row]) -> list[list[str]]:
    """Header and one line per method: perplexity in every bucket of positions, then of all of the longest length."""
    longest, trained = rows[0]["lengths"][-1], rows[0]["trained_length"]
    buckets = bucket_names(rows)
    columns = [("bucket", *bucket) for bucket, _ in buckets] + [("prefix", 0, longest)]
    return [["method", *(name for _, name in buckets), bucket_name(0, longest, trained)]] + [
        [method, *("" if row is None else perplexity_text(row["nll"]) for row in cells)]
        for method, cells in rows_by_method(rows, columns)
    ]


def difference_lines(rows: list[Row], field: str = "difference", omit: str = UNPATCHED) -> list[list[str]]:
    """Header and one line per method: a paired difference in the buckets around and beyond 1x."""
    trained = rows[0]["trained_length"]
    buckets = [bucket for bucket in bucket_names(rows) if bucket[0][1] >= trained]
    buckets = buckets[:1] + buckets[-2:] if len(buckets) > 3 else buckets
    return [["method", *(name for _, name in buckets)]] + [
        [method, *("" if row is None else difference_text(row, field) for row in cells)]
        for method, cells in rows_by_method(rows, [("bucket", *bucket) for bucket, _ in buckets])
        if method != omit
    ]
