"""The modules for 🤗 evaluate: loaded from their folders, checked against the library's own rows."""

import math

import numpy as np
import pytest

import rope_scaling.eval
from rope_scaling.eval.scoring.buckets import measure
from rope_scaling.eval.stats import wilson


evaluate = pytest.importorskip("evaluate")
FOLDER = f"{next(iter(rope_scaling.eval.__path__))}/metrics"


@pytest.fixture(scope="module")
def perplexity():
    return evaluate.load(f"{FOLDER}/position_perplexity")


@pytest.fixture(scope="module")
def retrieval():
    return evaluate.load(f"{FOLDER}/retrieval_score")


CURVES = [np.random.default_rng(n).gamma(2.0, size=n).tolist() for n in (1023, 1023, 700, 300)]


def test_buckets_are_those_of_evaluation_rows(perplexity):
    found = perplexity.compute(nlls=CURVES, trained_length=256)
    arrays = [np.array(curve) for curve in CURVES]
    rows = [row for row in measure(arrays, arrays, [256, 512, 1024], 256, 0) if row["measure"] == "bucket"]
    assert list(found["perplexity"]) == ["(0,0.5x]", "(0.5x,1x]", "(1x,2x]", "(2x,4x]"]
    for row, name in zip(rows, found["perplexity"], strict=True):
        assert found["perplexity"][name] == pytest.approx(math.exp(row["nll"]))
        assert (found["nll_low"][name], found["nll_high"][name]) == (row["nll_low"], row["nll_high"])
    assert list(found["documents"].values()) == [4, 4, 3, 2]
    one = perplexity.compute(nlls=CURVES[:1], trained_length=512, lengths=[512, 1000])
    assert list(one["nll"]) == ["(0,0.5x]", "(0.5x,1x]", "(1x,1000]"] and one["nll_low"]["(0,0.5x]"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`trained_length` must be a whole number"),
        ({"trained_length": 2048}, "The longest document has 1024 tokens"),
        ({"trained_length": 256, "lengths": [512, 256]}, "`lengths` must ascend"),
        ({"trained_length": 256, "nlls": [[math.nan] * 300]}, "not finite"),
        ({"trained_length": 256, "length": [256]}, "Unknown arguments: length"),
    ],
)
def test_what_perplexity_cannot_take(perplexity, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity.compute(**{"nlls": CURVES} | arguments)


def test_shares_of_answers(retrieval):
    written = ["It is 71.", "red and BLUE", "red", "nothing"]
    wanted = [["71"], ["red", "blue"], ["red", "blue"], ["x"]]
    found = retrieval.compute(predictions=written, references=wanted)
    interval = wilson(2, 4)
    assert (found["accuracy"], found["accuracy_low"]) == (0.5, interval.low) and found["correct"] == 2
    assert retrieval.compute(predictions=written, references=wanted, match="any")["correct"] == 3
    assert retrieval.compute(predictions=written, references=wanted, match="exact")["correct"] == 1
    groups = retrieval.compute(predictions=written, references=wanted, groups=[1, 1, 2, 2])["by_group"]
    assert {label: one["accuracy"] for label, one in groups.items()} == {1: 1.0, 2: 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "some"}, "`match` must be one of all, any, exact; got 'some'"),
        ({"references": [[]]}, "at least one reference"),
        ({"references": [[" "]]}, "none may be empty"),
        ({"groups": [1, 2]}, "2 labels for 1 predictions"),
        ({"mach": "any"}, "Unknown arguments: mach"),
    ],
)
def test_what_retrieval_cannot_take(retrieval, arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval.compute(**{"predictions": ["a"], "references": [["a"]]} | arguments)


def test_they_combine(perplexity, retrieval):
    both = evaluate.combine([perplexity, retrieval])
    found = both.compute(nlls=CURVES, predictions=["7"], references=[["7"]], trained_length=256)
    assert found["accuracy"] == 1.0 and "(2x,4x]" in found["perplexity"]


def test_they_cite_and_describe(perplexity, retrieval):
    for metric in (perplexity, retrieval):
        assert "https://huggingface.co/papers/" in metric.citation and "Returns:" in metric.inputs_description
