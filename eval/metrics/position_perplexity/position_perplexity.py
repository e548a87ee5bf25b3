"""Perplexity by position, as a module of 🤗 evaluate: `evaluate.load(<this folder>)`."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np

from rope_scaling.eval.formatting import bucket_name
from rope_scaling.eval.metric_arguments import check_arguments
from rope_scaling.eval.scoring.buckets import measure


_CITATION = """\
@article{press2021shortformer,
  title = {Shortformer: Better Language Modeling using Shorter Inputs},
  author = {Ofir Press and Noah A. Smith and Mike Lewis},
  year = {2021},
  url = {https://huggingface.co/papers/2012.15832}
}
"""

_DESCRIPTION = """\
Perplexity in buckets of positions: (0,0.5x], (0.5x,1x], (1x,2x], ..., where 1x is the length that the model was
trained at. One number for a whole text hides where a model breaks; the bucket in which it does shows it.
"""

_KWARGS_DESCRIPTION = """\
Args:
    nlls (list of list of float): Negative log-likelihoods in nats of the tokens of each document from the second on
        (the first has nothing before it). All documents begin at position 0.
    trained_length (int): 1x, in tokens.
    lengths (list of int, optional): Where buckets end, ascending; by default the powers of two times `trained_length`
        up to the length of the longest document.
    seed (int): Of the bootstrap over documents.
Returns:
    `perplexity`: by bucket. `nll`, `nll_low`, `nll_high`: the mean in nats a token and its 95% interval over documents
    (None for one document), by bucket. `documents`: how many extend to the bucket's end; shorter ones are left out.
Examples:
    >>> metric = evaluate.load("rope_scaling/eval/metrics/position_perplexity")
    >>> metric.compute(nlls=[[2.0] * 255 + [4.0] * 256], trained_length=256)["perplexity"]["(1x,2x]"]
    54.598150033144236
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PositionPerplexity(evaluate.Metric):
    """Perplexity by position."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nlls": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(
        self,
        nlls: list[list[float]],
        trained_length: int | None = None,
        lengths: list[int] | None = None,
        seed: int = 0,
        **others: Any,
    ) -> dict[str, Any]:
        check_arguments(others)
        if not isinstance(trained_length, int) or trained_length < 4:
            raise ValueError(f"`trained_length` must be a whole number of 4 or more tokens; got {trained_length!r}.")
        curves = [np.asarray(values, dtype=np.float64) for values in nlls]
        if not all(np.isfinite(curve).all() for curve in curves):
            raise ValueError("`nlls` holds values that are not finite: nothing to average.")
        longest = max((len(curve) + 1 for curve in curves), default=0)
        if lengths is None:
            lengths = [trained_length << k for k in range(40) if trained_length << k <= longest]
        if not lengths or lengths[0] > longest or sorted(set(lengths)) != list(lengths):
            raise ValueError(
                f"The longest document has {longest} tokens; `lengths` must ascend and begin below that. They are "
                f"{lengths} for `trained_length` {trained_length}."
            )
        rows = {
            bucket_name(row["from"], row["to"], trained_length): row
            for row in measure(curves, curves, list(lengths), trained_length, seed)
            if row["measure"] == "bucket"
        }
        fields = ("nll", "nll_low", "nll_high", "documents")
        return {
            "perplexity": {name: math.exp(row["nll"]) for name, row in rows.items()},
            **{field: {name: row[field] for name, row in rows.items()} for field in fields},
        }
