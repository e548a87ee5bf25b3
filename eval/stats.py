"""Statistics: intervals and paired tests. The unit is the document: its tokens are not independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean, with its 95% interval over documents (`None` with fewer than two of them)."""

    mean: float
    low: float | None
    high: float | None

    def fields(self, name: str) -> dict[str, float | None]:
        """As fields of a row: `name`, `name_low`, `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def resamples(num_documents: int, seed: int) -> np.ndarray:
    """How often each document is drawn in each resample, `[NUM_RESAMPLES, num_documents]`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=NUM_RESAMPLES)


def estimate(sums: np.ndarray, counts: np.ndarray, seed: int) -> Estimate:
    """The ratio of sums with a percentile bootstrap over documents.

    Args:
        sums (`np.ndarray`): Nats summed over each document's tokens, or differences of such sums, `[documents]`.
        counts (`np.ndarray`): Tokens of each document, `[documents]`.
        seed (`int`): The same seed draws the same documents, whatever is estimated: that pairs methods.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(mean, None, None)
    weights = resamples(len(sums), seed)
    drawn = weights @ counts
    low, high = np.percentile((weights @ sums)[drawn > 0] / drawn[drawn > 0], [2.5, 97.5])
    return Estimate(mean, float(low), float(high))


def paired(
    name: str, own: np.ndarray, plain: np.ndarray, cropped: np.ndarray | None, counts: np.ndarray, seed: int
) -> dict[str, float | None]:
    """Fields of a row: a method's mean as `name`, and its differences to both baselines on the same documents.

    Args:
        name (`str`): Of the field of the mean; differences are `difference` (to the unpatched model) and
            `to_cropping`.
        own (`np.ndarray`): Sums of the method over each document, `[documents]`.
        plain (`np.ndarray`): Those of the unpatched model.
        cropped (`np.ndarray`, *optional*): Those of the cropping baseline.
        counts (`np.ndarray`): What the sums are divided by, such as tokens, `[documents]`.
        seed (`int`): Of the bootstrap over documents.
    """
    fields = estimate(own, counts, seed).fields(name) | estimate(own - plain, counts, seed).fields("difference")
    return fields if cropped is None else fields | estimate(own - cropped, counts, seed).fields("to_cropping")


def wilson(correct: int, asked: int) -> Estimate:
    """A share with its 95% Wilson score interval."""
    from scipy.stats import binomtest

    interval = binomtest(correct, asked).proportion_ci(method="wilson")
    return Estimate(correct / asked, float(interval.low), float(interval.high))


def share_right(right: Sequence[bool] | np.ndarray) -> dict[str, float | None]:
    """Fields of a row: how many of some answers are right, and their share as `accuracy`, with its interval."""
    correct, asked = int(np.sum(right)), len(right)
    return {"correct": correct, "asked": asked, **wilson(correct, asked).fields("accuracy")}


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p-value that two methods answer the same questions equally well.

    Args:
        first, second (`np.ndarray`): Whether each question was answered right, `[questions]`, in the same order.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def usable_length(
    buckets: Sequence[np.ndarray], counts: Sequence[np.ndarray], reference: np.ndarray, tolerance: float, seed: int
) -> tuple[int, int | None, int | None]:
    """How many of the buckets that follow each other stay within a tolerance of the reference bucket.

    Args:
        buckets (list of `np.ndarray`): Nats summed over each document's tokens, a bucket each, nearest first,
            `[documents]`.
        counts (list of `np.ndarray`): Tokens of each document in each bucket, 0 where it ends before the bucket does.
        reference (`np.ndarray`): Nats and tokens of each document in the bucket that is compared with,
            `[2, documents]`.
        tolerance (`float`): In nats a token.
        seed (`int`): Of the bootstrap over documents.

    Returns:
        The number of buckets, and its 95% interval (`None` with fewer than two documents).
    """
    num_documents = reference.shape[1]
    plain = np.ones((1, num_documents))
    weights = np.concatenate([plain, resamples(num_documents, seed)]) if num_documents > 1 else plain
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = (weights @ reference[0]) / (weights @ reference[1]) + tolerance
        within = np.ones(len(weights), dtype=bool)
        reached = np.zeros(len(weights), dtype=int)
        for sums, tokens in zip(buckets, counts, strict=True):
            within &= (weights @ sums) / (weights @ tokens) <= limit  # false where nothing was drawn
            reached += within
    if num_documents < 2:
        return int(reached[0]), None, None
    low, high = np.percentile(reached[1:], [2.5, 97.5], method="nearest")
    return int(reached[0]), int(low), int(high)
