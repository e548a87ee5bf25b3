"""Loss by position of the token, from one pass over each document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.figures import curves_figure
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, difference_text, length_name, to_cropping_text
from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.scoring.buckets import curve_slice, measure, position_buckets
from rope_scaling.eval.stats import usable_length
from rope_scaling.eval.tasks.base import Picture, Scores, SummaryEntry
from rope_scaling.eval.tasks.curve_task import CurveTask, difference_lines, perplexity_lines


@dataclass(frozen=True, kw_only=True)
class Perplexity(CurveTask):
    """Loss in buckets of positions and over prefixes, and the usable length that follows."""

    name: ClassVar[str] = "perplexity"
    about: ClassVar[str] = "loss by position, the usable length, and the tax below 1x"
    place: ClassVar[int] = 0
    draws_scores: ClassVar[bool] = True

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

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Perplexity by bucket, and the differences to both baselines."""
        title = "Difference to {} on the same tokens, nats a token, 95% interval"
        tables = [
            Table(f"Perplexity by position, 1x = {rows[0]['trained_length']} tokens", perplexity_lines(rows)),
            Table(title.format(UNPATCHED), difference_lines(rows)),
        ]
        if "to_cropping" in rows[0]:
            tables.append(Table(title.format(CROPPING), difference_lines(rows, "to_cropping", CROPPING)))
        return tables

    @classmethod
    def pictures(cls, rows: list[Row], scores: Mapping[str, list[np.ndarray]]) -> Iterator[Picture]:
        """Curves of all methods."""
        if scores:
            title = f"Loss by position: {rows[0]['model']}"
            figure = curves_figure(dict(scores), rows[0]["trained_length"], title)
            yield Picture("curves", figure, "loss by position, one line a method")

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """Usable length, tax below 1x, and the last bucket: its loss, and the difference to cropping."""
        trained = rows[0]["trained_length"]
        usable = [row for row in rows if row["measure"] == "usable_length"]
        below = [row for row in rows if row["measure"] == "prefix" and row["to"] == trained]
        far = [row for row in rows if row["measure"] == "bucket" and row["to"] == row["lengths"][-1]]
        paired = [row for row in far if "to_cropping" in row]
        return [
            SummaryEntry.of(usable, "usable_length", "usable_length", "usable length", _usable_text),
            SummaryEntry.of(below, "tax", "difference", "tax below 1x, nats", difference_text),
            SummaryEntry.of(far, "nll", "nll"),
            SummaryEntry.of(paired, "to_cropping", "to_cropping", "to cropping at {longest}, nats", to_cropping_text),
        ]


def _usable_text(row: Row) -> str:
    length, low, high = (row[f"usable_length{end}"] for end in ("", "_low", "_high"))
    trained = row["trained_length"]
    interval = "" if low is None else f" [{length_name(low, trained)},{length_name(high, trained)}]"
    return length_name(length, trained) + interval


def _sums(curves: list[np.ndarray], bucket: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each document in a bucket of positions, both 0 where the document ends inside it."""
    inside = curve_slice(*bucket)
    whole = [curve[inside] if len(curve) >= inside.stop else curve[:0] for curve in curves]
    return np.array([part.sum(dtype=np.float64) for part in whole]), np.array([float(len(part)) for part in whole])
