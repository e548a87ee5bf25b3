"""Tasks whose answers are in the text: right if greedy decoding would write them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.figures import heat_figure, lengths_figure
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, accuracy_text, lines_by_length
from rope_scaling.eval.scoring.answers import Prompt, Trial
from rope_scaling.eval.stats import mcnemar, paired, share_right
from rope_scaling.eval.tasks.base import Picture, Scores, SummaryEntry
from rope_scaling.eval.tasks.prompts import PromptTask, Writer
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class RetrievalTask(PromptTask):
    """Prompts with answers that only the text tells."""

    recognised_by: ClassVar[str] = "length"

    @abstractmethod
    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """The prompts of one trial, of `length` tokens each with the longest question and answer."""

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Trial], int]:
        """Every trial of every length."""
        filler = self.filler(source, config)
        return [
            Trial(name, self.prompts(writer, length))
            for length in config.lengths
            for name, writer in self.writers(source, filler, config, length)
        ], 0

    def rows(self, items: Sequence[Trial], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length, and a row a depth of each where answers lie at depths."""
        rows = []
        for length in config.lengths:
            chosen = [index for index, item in enumerate(items) if length in item.lengths]
            inside = [np.array(items[index].lengths) == length for index in chosen]
            depths = [
                np.where(mask, np.array([q.depth for q in items[index].questions], dtype=float), np.nan)
                for index, mask in zip(chosen, inside, strict=True)
            ]
            rows.append(_row("length", length, None, chosen, inside, scores))
            for depth in sorted({value for part in depths for value in part if value == value}):
                rows.append(_row("cell", length, depth, chosen, [part == depth for part in depths], scores))
        return rows

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Accuracy, and the loss of right answers, by length."""
        task = rows[0]["task"]
        losses = lines_by_length(rows, "length", lambda row: f"{row['nll']:.2f}")
        return [
            Table(f"{task}: answers right, 95% interval", lines_by_length(rows, "length", accuracy_text)),
            Table(f"{task}: nats a token of the right answer", losses),
        ]

    @classmethod
    def pictures(cls, rows: list[Row], scores: Mapping[str, list[np.ndarray]]) -> Iterator[Picture]:
        """Accuracy by length, and by length and depth where answers lie at depths."""
        task, trained = rows[0]["task"], rows[0]["trained_length"]
        if by_length := [row for row in rows if row["measure"] == "length"]:
            title = f"{task}: share of answers right, with 95% intervals"
            figure = lengths_figure(by_length, "accuracy", trained, title, "accuracy")
            yield Picture(task, figure, task.replace("_", " "))
        if cells := [row for row in rows if row["measure"] == "cell"]:
            figure = heat_figure(cells, trained, f"{task}: answers found, by length and depth")
            yield Picture(f"{task}_depths", figure, f"{task} depths".replace("_", " "))

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """Accuracy at the longest length."""
        longest = [row for row in rows if row["measure"] == "length" and row["to"] == row["lengths"][-1]]
        task = rows[0]["task"]
        entry = SummaryEntry.of(longest, f"{task}.accuracy", "accuracy", f"{task} at {{longest}}", accuracy_text)
        return [entry] if longest else []


def _row(
    measure: str, length: int, depth: float | None, chosen: list[int], inside: list[np.ndarray], scores: Scores
) -> Row:
    own, plain, cropped = (
        [values[index][mask] for index, mask in zip(chosen, inside, strict=True)]
        for values in (scores.own, scores.unpatched, scores.cropping)
    )
    right, right_plain, right_cropped = (
        np.concatenate([part[:, 0] for part in parts]) > 0 for parts in (own, plain, cropped)
    )
    counts = np.array([part[:, 2].sum() for part in own])
    nats, nats_plain, nats_cropped = (
        np.array([-part[:, 1].sum() for part in parts]) for parts in (own, plain, cropped)
    )
    row: Row = {"measure": measure, "to": length, "depth": depth, "trials": len(chosen), **share_right(right)}
    row |= paired("nll", nats, nats_plain, nats_cropped, counts, seed=0)
    return row | {"mcnemar": mcnemar(right, right_plain), "mcnemar_to_cropping": mcnemar(right, right_cropped)}
