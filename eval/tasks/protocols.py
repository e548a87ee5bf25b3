"""The perplexities that papers report, each under the name of where its definition comes from.

They average over different tokens, so numbers of two protocols must not be compared. All give one number a length `L`:

| protocol | windows | scored | average |
| --- | --- | --- | --- |
| `yarn_truncate` | one a document: its first `L` tokens | all | over documents |
| `yarn_stride` | every `stride` tokens, each behind the BOS, `L` tokens | new ones; all of the first | over windows |
| `pose_stride` | the same | the same | over tokens |
| `longlora_stream` | every `stride` tokens of all documents run together, `L` tokens, no BOS | all | over windows |

`yarn_truncate` and `longlora_stream` are means over all positions up to `L`, so what happens at the far end hardly
shows; `pose_stride` comes closest to the loss with `L` tokens of context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, lines_by_length, perplexity_text
from rope_scaling.eval.methods import UNPATCHED
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.eval.stats import paired
from rope_scaling.eval.tasks.base import Scores, Task
from rope_scaling.eval.tasks.curve_task import CurveTask
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class _Protocol(Task):
    """A task that gives one perplexity a length."""

    recognised_by: ClassVar[str] = "protocol"

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Perplexity by length."""
        read = sum(row["tokens_read"] for row in rows if row["method"] == UNPATCHED)
        title = f"Perplexity by the protocol {rows[0]['task']}, {read:,} tokens read a method"
        return [Table(title, lines_by_length(rows, "protocol", lambda row: perplexity_text(row["nll"])))]


@dataclass(frozen=True, kw_only=True)
class YarnTruncate(_Protocol, CurveTask):
    """YaRN's evaluation with `--truncate` (https://huggingface.co/papers/2309.00071): mean over a prefix.

    By causality the prefixes are parts of one pass, so this costs nothing beside the perplexity task.
    """

    name: ClassVar[str] = "yarn_truncate"
    about: ClassVar[str] = "YaRN's truncate protocol: the mean over each document's first tokens"

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length: the mean of the documents' means."""
        rows = []
        for length in config.lengths:
            chosen = [index for index, item in enumerate(items) if len(item.ids) >= length]
            if chosen:
                own, plain, cropped = (
                    np.array([values[i][: length - 1].mean(dtype=np.float64) for i in chosen])
                    for values in (scores.own, scores.unpatched, scores.cropping)
                )
                read = float(length * len(chosen))
                rows.append(_row(length, own, plain, cropped, np.ones(len(chosen)), read, config.seed))
        return rows


@dataclass(frozen=True, kw_only=True)
class _Windowed(_Protocol):
    """Windows over documents. Scores are a line a window, `[windows, 4]`: length, nats, tokens scored, tokens read."""

    stride: int = 256
    """Tokens from one window to the next."""

    def stored_as(self, config: EvaluationConfig) -> str:
        """The two that differ in the average only share their scores."""
        return f"windows_{self.stride}"

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Document], int]:
        """Documents of at least the shortest length, cut at the longest."""
        if not 0 < self.stride < config.lengths[0]:
            raise RopeScalingError(
                f"`stride` of {self.name!r} must be positive and less than the shortest length {config.lengths[0]}; "
                f"got {self.stride}."
            )
        documents = source.documents(config.lengths)
        return documents.items, documents.skipped

    def score(self, model: Any, item: Document, config: EvaluationConfig) -> np.ndarray:
        """Every window of every length."""
        lengths = [length for length in config.lengths if length <= len(item.ids)]
        return np.concatenate([self._length(model, item, length, length, config) for length in lengths])

    def score_cropped(self, model: Any, item: Document, plain: np.ndarray, config: EvaluationConfig) -> np.ndarray:
        """Windows longer than the trained length are replaced by windows of the trained length."""
        trained = config.trained_length
        longer = [length for length in config.lengths if trained < length <= len(item.ids)]
        parts = [plain[plain[:, 0] <= trained]]
        if longer:
            known = plain[plain[:, 0] == trained]
            short = known if len(known) else self._length(model, item, trained, trained, config)
            for length in longer:
                relabelled = short.copy()
                relabelled[:, 0] = length
                parts.append(relabelled)
        return np.concatenate(parts)

    def windows(self, ids: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Token ids of each window, and from which of its losses on they are scored."""
        bos, text = ids[:1], ids[1:]
        start, done = 0, 0
        while done < len(text):
            end = min(start + length - 1, len(text))
            yield torch.cat([bos, text[start:end]]), done - start
            start, done = start + self.stride, end

    def _length(self, model: Any, item: Document, length: int, label: int, config: EvaluationConfig) -> np.ndarray:
        lines = []
        # Windows of one size go through the model together, as many as fit a chunk.
        for size, alike in groupby(self.windows(item.ids, length), key=lambda window: len(window[0])):
            group = list(alike)
            rows = max(config.chunk_size // size, 1)
            for start in range(0, len(group), rows):
                part = group[start : start + rows]
                losses = nll_curve(model, torch.stack([ids for ids, _ in part]), config.chunk_size)
                for loss, (_, first) in zip(losses.double(), part, strict=True):
                    lines.append((label, loss[first:].sum().item(), len(loss) - first, size))
        return np.array(lines)


@dataclass(frozen=True, kw_only=True)
class YarnStride(_Windowed):
    """YaRN's sliding window (https://huggingface.co/papers/2309.00071): every window weighs alike."""

    name: ClassVar[str] = "yarn_stride"
    about: ClassVar[str] = "YaRN's sliding window: new tokens of each window, windows weigh alike"

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length: the mean over all windows of all documents of each window's mean."""
        return _window_rows(scores, config, by_window=True)


@dataclass(frozen=True, kw_only=True)
class PoseStride(_Windowed):
    """PoSE's sliding window (https://huggingface.co/papers/2309.10400): every token weighs alike."""

    name: ClassVar[str] = "pose_stride"
    about: ClassVar[str] = "PoSE's sliding window: new tokens of each window, tokens weigh alike"

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length: the mean over all scored tokens."""
        return _window_rows(scores, config, by_window=False)


@dataclass(frozen=True, kw_only=True)
class LongLoraStream(_Windowed):
    """LongLoRA's evaluation (https://huggingface.co/papers/2309.12307): windows over all documents run together.

    Every token is scored `L / stride` times, at all positions of a window, and windows cross from one document into
    the next.
    """

    name: ClassVar[str] = "longlora_stream"
    about: ClassVar[str] = "LongLoRA's stream: all tokens of overlapping windows over texts run together"

    def stored_as(self, config: EvaluationConfig) -> str:
        """By stride."""
        return f"{self.name}_{self.stride}"

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Document], int]:
        """One item: the documents' tokens, one after the other."""
        documents, skipped = super().items(source, config, model)
        stream = torch.cat([item.ids[len(source.bos) :] for item in documents])
        return [Document(f"{len(documents)} documents", stream)], skipped

    def windows(self, ids: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Full windows, wherever a stride begins, scored whole."""
        for start in range(0, len(ids) - length + 1, self.stride):
            yield ids[start : start + length], 0

    def rows(self, items: Sequence[Document], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length: the mean over windows. One stream has no interval."""
        return _window_rows(scores, config, by_window=True)


def _window_rows(scores: Scores, config: EvaluationConfig, by_window: bool) -> list[Row]:
    rows = []
    for length in config.lengths:
        own, plain, cropped = (
            [lines[lines[:, 0] == length] for lines in values]
            for values in (scores.own, scores.unpatched, scores.cropping)
        )
        chosen = [index for index, lines in enumerate(own) if len(lines)]
        if not chosen:
            continue

        def sums(values: list[np.ndarray], chosen: list[int] = chosen) -> np.ndarray:
            parts = (values[i][:, 1] / values[i][:, 2] if by_window else values[i][:, 1] for i in chosen)
            return np.array([part.sum() for part in parts])

        # Cropped windows are shorter, so there are more of them: each kind is averaged by its own count.
        counts = [
            np.array([len(v[i]) if by_window else v[i][:, 2].sum() for i in chosen], dtype=np.float64)
            for v in (own, plain, cropped)
        ]
        read = float(sum(own[i][:, 3].sum() for i in chosen))
        scale = counts[0] / counts[2]
        rows.append(_row(length, sums(own), sums(plain), sums(cropped) * scale, counts[0], read, config.seed))
    return rows


def _row(
    length: int, own: np.ndarray, plain: np.ndarray, cropped: np.ndarray, counts: np.ndarray, read: float, seed: int
) -> Row:
    row: Row = {"measure": "protocol", "to": length, "documents": len(own), "tokens_read": int(read)}
    return row | paired("nll", own, plain, cropped, counts, seed)
