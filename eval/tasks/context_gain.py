"""Whether a model uses its context: the same last tokens, with more and more text before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.figures import lengths_figure
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, difference_text, lines_by_length, to_cropping_text
from rope_scaling.eval.methods import CROPPING
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.eval.stats import estimate, paired
from rope_scaling.eval.tasks.base import Picture, Scores, SummaryEntry, Task
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class ContextGain(Task):
    """The last tokens of each document, scored with the last 0.5x, 1x, 2x, ... tokens.

    Loss by position compares different tokens; here they are the same at every length, so the text cancels. The gain
    at a length is the loss at 1x less the loss there: a method that merely does not break has 0.
    """

    name: ClassVar[str] = "context_gain"
    about: ClassVar[str] = "the same last tokens with more and more context before them"
    recognised_by: ClassVar[str] = "context"
    place: ClassVar[int] = 1

    num_targets: int | None = None
    """Tokens that are scored; by default a quarter of the trained length, and at most 1,024."""

    def stored_as(self, config: EvaluationConfig) -> str:
        """By the number of targets."""
        return f"{self.name}_{self.targets(config)}"

    def targets(self, config: EvaluationConfig) -> int:
        """Number of tokens that are scored."""
        return self.num_targets or max(min(1024, config.trained_length // 4), 1)

    def windows(self, config: EvaluationConfig) -> list[int]:
        """Tokens that the model gets, targets included: half the trained length, it, and longer ones."""
        trained = config.trained_length
        return sorted({trained // 2, trained} | {length for length in config.lengths if length > trained})

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Document], int]:
        """Documents cut at the longest length, of at least twice the trained length where lengths go that far."""
        windows, targets = self.windows(config), self.targets(config)
        if not 0 < targets < windows[0]:
            raise RopeScalingError(
                f"`num_targets` must be positive and less than half the trained length ({windows[0]}); got {targets}."
            )
        if len(windows) < 3:
            raise RopeScalingError(
                f"context_gain needs a length beyond the trained one ({config.trained_length}); got {config.lengths}."
            )
        documents = source.documents(windows[2:])
        return documents.items, documents.skipped

    def score(self, model: Any, item: Document, config: EvaluationConfig) -> np.ndarray:
        """Losses of the targets at every length that the document has, `[lengths, targets]`."""
        fitting = [length for length in self.windows(config) if length <= len(item.ids)]
        return np.stack([self._window(model, item.ids, length, config) for length in fitting])

    def score_cropped(self, model: Any, item: Document, plain: np.ndarray, config: EvaluationConfig) -> np.ndarray:
        """What the unpatched model has at 1x, for every longer length."""
        return np.stack([plain[min(index, 1)] for index in range(len(plain))])

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length: the loss, the gain over 1x, and the differences to both baselines."""
        rows = []
        for index, length in enumerate(self.windows(config)):
            chosen = [i for i, values in enumerate(scores.own) if len(values) > index]
            if not chosen:
                continue
            counts = np.full(len(chosen), float(self.targets(config)))

            def sums(values: list[np.ndarray], at: int = index, chosen: Sequence[int] = tuple(chosen)) -> np.ndarray:
                return np.array([values[i][at].sum(dtype=np.float64) for i in chosen])

            own = sums(scores.own)
            row: Row = {"measure": "context", "to": length, "documents": len(chosen), "tokens": int(counts.sum())}
            row |= paired("nll", own, sums(scores.unpatched), sums(scores.cropping), counts, config.seed)
            row |= estimate(sums(scores.own, 1) - own, counts, config.seed).fields("gain")
            rows.append(row)
        return rows

    def _window(self, model: Any, ids: torch.Tensor, length: int, config: EvaluationConfig) -> np.ndarray:
        window = torch.cat([ids[:1], ids[len(ids) - length + 1 :]])
        return nll_curve(model, window[None], config.chunk_size)[0, -self.targets(config) :].numpy()

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """The gain over 1x, and the difference to cropping, by length."""
        gain = "Context gain: nats a token that more context than 1x saves on the same last tokens, 95% interval"
        cropping = f"The same tokens: difference to {CROPPING}, nats a token, 95% interval"
        return [
            Table(gain, lines_by_length(rows, "context", _gain_text)),
            Table(cropping, lines_by_length(rows, "context", to_cropping_text)),
        ]

    @classmethod
    def pictures(cls, rows: list[Row], scores: Mapping[str, list[np.ndarray]]) -> Iterator[Picture]:
        """The gain by length."""
        title = "Nats a token that context beyond 1x saves on the same last tokens"
        trained = rows[0]["trained_length"]
        figure = lengths_figure(rows, "gain", trained, title, "gain over 1x, nats a token")
        yield Picture(rows[0]["task"], figure, "gain from context beyond the trained length")

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """The gain at the longest length."""
        longest = [row for row in rows if row["to"] == row["lengths"][-1]]
        return [SummaryEntry.of(longest, "context_gain", "gain", "context gain, nats", _gain_text)] if longest else []


def _gain_text(row: Row) -> str:
    return difference_text(row, "gain")
