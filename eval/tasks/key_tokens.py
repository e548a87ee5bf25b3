"""Loss on the tokens that a long context makes predictable, after LongPPL (https://huggingface.co/papers/2410.23771).

Most tokens are predicted from the last few hundred, so a mean over all of them hardly moves when far context is lost.
An evaluator model finds those that do depend on it: key tokens are those that it predicts well with the whole text
before them, and much better than with the last tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.files import Row, write_arrays
from rope_scaling.eval.formatting import Table
from rope_scaling.eval.hashes import digest
from rope_scaling.eval.methods import CROPPING, UNPATCHED, MethodSpec, parse_method, self_extend_to
from rope_scaling.eval.scoring.buckets import measure
from rope_scaling.eval.scoring.identity import environment, method_sha256, weights_sha256
from rope_scaling.eval.scoring.nll import nll_curve, windowed_nll_curve
from rope_scaling.eval.tasks.base import Scores
from rope_scaling.eval.tasks.curve_task import (
    CurveTask,
    MaskedDocument,
    difference_lines,
    masked,
    perplexity_lines,
)
from rope_scaling.eval.tasks.source import Source
from rope_scaling.hf.loading import load_model, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class KeyTokens(CurveTask):
    """Loss on key tokens, by position."""

    name: ClassVar[str] = "key_tokens"
    about: ClassVar[str] = "loss on the tokens that a long context makes predictable"
    keeps: ClassVar[str] = "key_tokens"

    evaluator: str | None = None
    """Model that decides which tokens are key; it needs the same tokenizer. By default the evaluated model."""
    evaluator_method: str | None = None
    """What the evaluator is patched with so that it reads the whole text: Self-Extend by default, `unpatched` for
    nothing. A method that is tested here too has a part in choosing the tokens it is tested on."""
    short_context: int | None = None
    """Tokens of the short context; half the trained length by default, and at most 4,096."""
    gain: float = 2.0
    """Nats that the long context must save."""
    loss: float = 2.0
    """Nats that the token may cost with the long context."""

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Document], int]:
        """The documents of the perplexity task, with masks, which the output folder keeps."""
        documents, skipped = super().items(source, config, model)
        short = self.short_context or min(config.trained_length // 2, 4096)
        if not 8 <= short < config.lengths[-1]:
            raise RopeScalingError(
                f"`short_context` must be 8 or more tokens, and less than the longest length {config.lengths[-1]}; "
                f"got {short}."
            )
        return masked(documents, self._masks(list(documents), source, config, model, short)), skipped

    def rows(self, items: Sequence[MaskedDocument], scores: Scores, config: EvaluationConfig) -> list[Row]:  # type: ignore[override]
        """A row a bucket and a row a prefix, over key tokens alone."""
        masks = [item.mask for item in items]
        return measure(
            scores.own,
            scores.unpatched,
            config.lengths,
            config.trained_length,
            config.seed,
            cropping=scores.cropping,
            masks=masks,
        )

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Perplexity of key tokens by bucket, and the difference to cropping."""
        count = max(row["tokens"] for row in rows)
        title = f"Key tokens: difference to {CROPPING}, nats a token, 95% interval"
        return [
            Table(f"Perplexity of the {count} key tokens, by position", perplexity_lines(rows)),
            Table(title, difference_lines(rows, "to_cropping", CROPPING)),
        ]

    def _masks(
        self, documents: list[Document], source: Source, config: EvaluationConfig, model: Any, short: int
    ) -> list[np.ndarray]:
        evaluator = model
        if self.evaluator is not None:
            if load_tokenizer(self.evaluator).get_vocab() != source.tokenizer.get_vocab():
                raise RopeScalingError(
                    f"The evaluator {self.evaluator!r} has another tokenizer than {config.model!r}, so its tokens are "
                    "others. Give an evaluator of the same family."
                )
            evaluator = load_model(self.evaluator, config.dtype, config.device)
        path = source.folder and source.folder / self.keeps / f"masks-{self._name(evaluator, documents, config)}.npz"
        if path and path.exists() and not source.fresh:
            with np.load(path) as stored:
                return [stored[document.sha256] for document in documents]
        masks = [self._mask(evaluator, document, config, short) for document in documents]
        if not any(mask.any() for mask in masks):
            raise RopeScalingError(
                "No token of these documents is a key token: the evaluator predicts none of them much better from the "
                "whole text. Give longer documents, a better `evaluator`, or a smaller `gain`."
            )
        if path:
            write_arrays(path, {item.sha256: mask for item, mask in zip(documents, masks, strict=True)})
        return masks

    def _name(self, evaluator: Any, documents: list[Document], config: EvaluationConfig) -> str:
        """Hash of all that the masks depend on."""
        spec, method = self._spec(config), None
        if spec.method != UNPATCHED:  # it then need not have RoPE
            with spec.patched(evaluator, config.factor):
                method = method_sha256(evaluator, config.lengths[-1])
        settings = [self.settings(), config.trained_length, config.chunk_size, environment()]
        return digest(weights_sha256(evaluator), method, settings, [document.sha256 for document in documents])

    def _spec(self, config: EvaluationConfig) -> MethodSpec:
        """What the evaluator is patched with."""
        return parse_method(self.evaluator_method) if self.evaluator_method else self_extend_to(config.factor)

    def _mask(self, evaluator: Any, document: Document, config: EvaluationConfig, short: int) -> np.ndarray:
        with self._spec(config).patched(evaluator, config.factor):
            long = nll_curve(evaluator, document.ids[None], config.chunk_size)[0]
        plain = torch.full_like(long, -torch.inf)  # nothing is key before the short context is full
        near = windowed_nll_curve(evaluator, document.ids, plain, short, short // 4, config.chunk_size)
        return ((near - long > self.gain) & (long < self.loss)).numpy()
