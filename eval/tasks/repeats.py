"""Loss on what the text repeats from further back than the trained length, apart from everything else.

Far context helps first where it can be copied from (https://huggingface.co/papers/2109.09115). A mean over positions
does not tell copying from anything else, and on a text that repeats nothing there is little to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.rows import measure
from rope_scaling.eval.tasks.base import Row, Scores, Source
from rope_scaling.eval.tasks.key_tokens import MaskedDocument
from rope_scaling.eval.tasks.perplexity import CurveTask


@dataclass(frozen=True, kw_only=True)
class Repeats(CurveTask):
    """Loss beyond the trained length, on tokens that repeat what stood more than that far back and on the others.

    A token repeats if it ends the same `ngram` tokens as an earlier one. What counts is the last time: if that lies
    inside the trained length, cropping has it too, and the token is one of the others. Scores are those of the
    perplexity task, so beside it this costs nothing.
    """

    name: ClassVar[str] = "repeats"
    about: ClassVar[str] = "loss beyond 1x on what stood in the text before, more than 1x back, and on the rest"

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
        masks = [far_repeats(one.ids.tolist(), self.ngram, trained) for one in documents]
        return [MaskedDocument(one.name, one.ids, mask) for one, mask in zip(documents, masks, strict=True)], skipped

    def rows(self, items: Sequence[MaskedDocument], scores: Scores, config: EvaluationConfig) -> list[Row]:  # type: ignore[override]
        """A row for each of the two, over documents of the longest length; none for repeats if there are none."""
        trained, longest = config.trained_length, config.lengths[-1]
        beyond = [np.arange(len(item.mask)) >= trained - 1 for item in items]
        rows = []
        for kind, wanted in (("repeats", True), ("others", False)):
            masks = [(item.mask == wanted) & far for item, far in zip(items, beyond, strict=True)]
            found = measure(
                scores.own, scores.unpatched, [longest], trained, config.seed, cropping=scores.cropping, masks=masks
            )
            rows += [row | {"measure": kind, "from": trained} for row in found if row["measure"] == "prefix"]
        return rows


def far_repeats(ids: Sequence[int], ngram: int, distance: int) -> np.ndarray:
    """Which tokens end an n-gram that stood in the text before, for the last time more than `distance` tokens back.

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
