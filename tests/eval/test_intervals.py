"""Statistics against values from their literature and from hand."""

import numpy as np
import pytest
from scipy.special import comb

from rope_scaling.eval.stats import mcnemar, usable_length, wilson


@pytest.mark.parametrize(
    ("correct", "asked", "low", "high"),
    [
        # Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I,
        # the score method without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(correct, asked, low, high):
    found = wilson(correct, asked)
    assert found.mean == correct / asked
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_mcnemar_is_the_exact_sign_test_of_what_only_one_gets_right():
    one = np.array([True] * 9 + [False] * 2 + [True] * 50)
    other = np.array([False] * 9 + [True] * 2 + [True] * 50)
    by_hand = 2 * sum(comb(11, k) for k in range(3)) / 2**11
    assert mcnemar(one, other) == mcnemar(other, one) == pytest.approx(by_hand)
    assert mcnemar(one, one) == 1.0


def reached(losses, reference=2.0, documents=6, tolerance=0.05, noise=0.0):
    """Of documents of 10 tokens a bucket that all have about these losses."""
    generator = np.random.default_rng(0)
    counts = [np.full(documents, 10.0)] * len(losses)
    sums = [10 * (loss + noise * generator.normal(size=documents)) for loss in losses]
    return usable_length(sums, counts, np.array([np.full(documents, 10 * reference), counts[0]]), tolerance, seed=0)


def test_usable_length_counts_the_buckets_up_to_the_first_that_is_worse():
    assert reached([2.0, 2.04, 1.9]) == (3, 3, 3)
    assert reached([2.0, 2.06, 1.9]) == (1, 1, 1), "what comes after a bad bucket does not count"
    assert reached([2.0, 2.06, 1.9], tolerance=0.1) == (3, 3, 3)
    assert reached([2.06, 1.0]) == (0, 0, 0)
    assert reached([2.0, 1.0], documents=1) == (2, None, None)


def test_usable_length_is_unsure_where_the_loss_is():
    count, low, high = reached([1.5, 2.05, 1.5, 3.0], noise=0.1)
    assert (low, high) == (1, 3) and low <= count <= high


def test_a_bucket_that_no_document_reaches_is_not_usable():
    counts = [np.array([10.0, 10.0]), np.zeros(2)]
    sums = [10 * np.array([2.0, 2.0]), np.zeros(2)]
    assert usable_length(sums, counts, np.array([[20.0, 20.0], [10.0, 10.0]]), 0.05, 0) == (1, 1, 1)
