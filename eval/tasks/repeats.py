"""Loss on what the text repeats from further back than the trained length, apart from everything else.

Far context helps first where it can be copied from (https://huggingface.co/papers/2109.09115). A mean over positions
does not tell copying from anything else, and on a text that repeats nothing there is little to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, perplexity_text, rows_by_method, to_cropping_text
from rope_scaling.eval.methods import CROPPING
from rope_scaling.eval.scoring.buckets import measure
from rope_scaling.eval.tasks.base import Scores, SummaryEntry
from rope_scaling.eval.tasks.curve_task import CurveTask, MaskedDocument, masked
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class Repeats(CurveTask):
    """Loss beyond the trained length, on tokens that repeat text from more than that far back, and on all others.

    A token repeats if it ends the same `ngram` tokens as an earlier one. What counts is the last time: if that lies
    inside the trained length, cropping has it too, and the token is one of the others. Scores are those of the
    perplexity task, so beside it this costs nothing.
    """

    name: ClassVar[str] = "repeats"
    about: ClassVar[str] = "loss beyond 1x on tokens that repeat text from more than 1x back, and on all others"

    place: ClassVar[int] = 2

    ngram: int = 6
    """Tokens in a row that have to be the same."""

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[MaskedDocument], int]:
        """The documents of the perplexity task, and which of their tokens repeat."""
        trained = config.trained_length
        if self.ngram < 2:
            raise RopeScalingError(f"`ngram` must be 2 or more tokens; got {self.ngram}.")
        if config.lengths[-1] <= trained:
            raise RopeScalingError(
                f"{self.name} needs a length beyond the trained one ({trained}); got {config.lengths}. Give longer "
                "`--lengths`."
            )
        documents, skipped = super().items(source, config, model)
        masks = [far_repeats(document.ids.tolist(), self.ngram, trained) for document in documents]
        return masked(documents, masks), skipped

    def rows(self, items: Sequence[MaskedDocument], scores: Scores, config: EvaluationConfig) -> list[Row]:  # type: ignore[override]
        """A row for each of the two, over documents of the longest length; none for repeats if there are none."""
        trained, longest = config.trained_length, config.lengths[-1]
        beyond = [np.arange(len(item.mask)) >= trained - 1 for item in items]
        rows = []
        for kind, wanted in (("repeats", True), ("others", False)):
            masks = [(item.mask == wanted) & far for item, far in zip(items, beyond, strict=True)]
            measured = measure(
                scores.own, scores.unpatched, [longest], trained, config.seed, cropping=scores.cropping, masks=masks
            )
            rows += [row | {"measure": kind, "from": trained} for row in measured if row["measure"] == "prefix"]
        return rows

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Perplexity of both kinds of tokens, and the difference to cropping."""
        counts = {row["measure"]: row["tokens"] for row in rows}
        title = (
            f"Perplexity beyond 1x of the {counts.get('repeats', 0):,} tokens that repeat text from more than 1x "
            f"back, and of the {counts.get('others', 0):,} others"
        )
        difference = f"Repeats and others: difference to {CROPPING}, nats a token, 95% interval"
        return [
            Table(title, _lines(rows, lambda row: perplexity_text(row["nll"]))),
            Table(difference, _lines(rows, to_cropping_text, omit=CROPPING)),
        ]

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """What far repeats gain on cropping."""
        far = [row for row in rows if row["measure"] == "repeats"]
        heading = "far repeats to cropping, nats"
        entry = SummaryEntry.of(far, "repeats", "to_cropping", heading, to_cropping_text, _NOTE)
        return [entry] if far else []


_NOTE = (
    "Far repeats are tokens that repeat text from more than 1x back, which cropping cannot see: what copying gains."
)


def _lines(rows: list[Row], text: Callable[[Row], str], omit: str = "") -> list[list[str]]:
    """Header and one line per method: a text made of the row of tokens that repeat, and of the row of the others."""
    kinds = ("repeats", "others")
    columns = [(kind, rows[0]["trained_length"], rows[0]["lengths"][-1]) for kind in kinds]
    return [["method", *kinds]] + [
        [method, *("" if row is None else text(row) for row in pair)]
        for method, pair in rows_by_method(rows, columns)
        if method != omit
    ]


def far_repeats(ids: Sequence[int], ngram: int, distance: int) -> np.ndarray:
    """Which tokens end an n-gram that occurred before, for the last time more than `distance` tokens back.

    Args:
        ids (sequence of `int`): Tokens of a text.
        ngram (`int`): Tokens of an n-gram.
        distance (`int`): In tokens.

    Returns:
        `np.ndarray`: bool, `[T - 1]`, aligned with the curve of the text: entry `t` is of the token `t + 1`.
    """
    mask = np.zeros(len(ids) - 1, dtype=bool)
    last: dict[tuple[int, ...], int] = {}
    for end in range(ngram - 1, len(ids)):
        gram = tuple(ids[end - ngram + 1 : end + 1])
        mask[end - 1] = end - last.get(gram, end) > distance
        last[gram] = end
    return mask
