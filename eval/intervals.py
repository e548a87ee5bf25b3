"""Bootstrap intervals. The unit is the document: tokens of one document are not independent of each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A token-weighted mean in nats, with its 95% interval over documents (`None` with fewer than two of them)."""

    mean: float
    low: float | None
    high: float | None


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
    low, high = np.percentile((weights @ sums) / (weights @ counts), [2.5, 97.5])
    return Estimate(mean, float(low), float(high))
