"""Losses in buckets of positions and over prefixes, paired with the baselines on the same tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from rope_scaling.eval.files import Row
from rope_scaling.eval.stats import paired


def position_buckets(lengths: list[int], trained_length: int) -> list[tuple[int, int]]:
    """Half-open-from-below intervals of positions, in tokens: halves of the trained length, then length to length."""
    inner = {trained_length // 2, trained_length}
    edges = sorted({0} | {edge for edge in inner if edge <= lengths[-1]} | set(lengths))
    return list(pairwise(edges))


def curve_slice(start: int, end: int) -> slice:
    """The entries of a curve, `[T - 1]`, for tokens in a bucket of positions; entry `t` is the loss of the token at
    position `t + 2` when positions count from 1."""
    return slice(max(start - 1, 0), end - 1)


def measure(
    curves: list[np.ndarray],
    reference: list[np.ndarray],
    lengths: list[int],
    trained_length: int,
    seed: int,
    *,
    cropping: list[np.ndarray] | None = None,
    masks: list[np.ndarray] | None = None,
) -> list[Row]:
    """Bucket and prefix measurements of one method, paired with the unpatched model on the same tokens.

    A document that ends inside a bucket or prefix stays out of it, so that all positions weigh alike.

    Args:
        curves (list of `np.ndarray`): Curves of the method, one a document, `[T - 1]`.
        reference (list of `np.ndarray`): Those of the unpatched model, of the same lengths.
        lengths (`list[int]`): Lengths of the prefixes, ascending.
        trained_length (`int`): The model's, in tokens.
        seed (`int`): Of the bootstrap.
        cropping (list of `np.ndarray`, *optional*): Those of the cropping baseline, to be paired with too.
        masks (list of `np.ndarray`, *optional*): Which tokens count, one a document, `[T - 1]`; all by default.
    """
    counted = [np.ones(len(curve), dtype=bool) for curve in curves] if masks is None else masks
    spans = [("bucket", *bucket) for bucket in position_buckets(lengths, trained_length)]
    spans += [("prefix", 0, length) for length in lengths]
    rows = []
    for kind, start, end in spans:
        inside = curve_slice(start, end)
        chosen = [i for i, curve in enumerate(curves) if len(curve) >= inside.stop]
        tokens = np.array([counted[i][inside].sum() for i in chosen], dtype=np.float64)
        if not tokens.sum():
            continue

        def sums(values: list[np.ndarray], inside: slice = inside, chosen: list[int] = chosen) -> np.ndarray:
            return np.array([values[i][inside][counted[i][inside]].sum(dtype=np.float64) for i in chosen])

        cropped = None if cropping is None else sums(cropping)
        row = {"measure": kind, "from": start, "to": end, "documents": len(chosen), "tokens": int(tokens.sum())}
        rows.append(row | paired("nll", sums(curves), sums(reference), cropped, tokens, seed))
    return rows
