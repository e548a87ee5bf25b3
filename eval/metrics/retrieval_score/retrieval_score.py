"""The share of answers that hold what was asked for, as a module of 🤗 evaluate: `evaluate.load(<this folder>)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from rope_scaling.eval.metric_arguments import check_arguments
from rope_scaling.eval.stats import share_right


_CITATION = """\
@article{hsieh2024ruler,
  title = {RULER: What's the Real Context Size of Your Long-Context Language Models?},
  author = {Cheng-Ping Hsieh and others},
  year = {2024},
  url = {https://huggingface.co/papers/2404.06654}
}
"""

_DESCRIPTION = """\
Retrieval accuracy with Wilson intervals. An answer is right if it holds all accepted strings (`match="all"`, as RULER
scores needles), any of them (`"any"`, as RULER scores questions), or equals one (`"exact"`). Case does not matter, nor
space around it.
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions (list of str): What the model wrote.
    references (list of list of str): What each answer should hold.
    match (str): `all`, `any` or `exact`.
    groups (list, optional): A label for each answer, such as its length or depth, for shares by label.
Returns:
    `accuracy`, `accuracy_low`, `accuracy_high`: the share and its 95% Wilson interval. `correct`, `asked`: the counts.
    `by_group`: the same by label, if there are labels.
Examples:
    >>> metric = evaluate.load("rope_scaling/eval/metrics/retrieval_score")
    >>> metric.compute(predictions=["It is 7."], references=[["7"]])["accuracy"]
    1.0
"""

_MATCHES: dict[str, Callable[[str, list[str]], bool]] = {
    "all": lambda text, wanted: all(reference in text for reference in wanted),
    "any": lambda text, wanted: any(reference in text for reference in wanted),
    "exact": lambda text, wanted: text in wanted,
}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalScore(evaluate.Metric):
    """The share of answers that hold what was asked for."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        match: str = "all",
        groups: list[Any] | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        check_arguments(others)
        if match not in _MATCHES:
            raise ValueError(f"`match` must be one of {', '.join(_MATCHES)}; got {match!r}.")
        if not predictions:
            raise ValueError("There are no predictions to score.")
        if not all(wanted and all(reference.strip() for reference in wanted) for wanted in references):
            raise ValueError("Every answer needs at least one reference, and none may be empty: all texts hold it.")
        if groups is not None and len(groups) != len(predictions):
            raise ValueError(f"`groups` has {len(groups)} labels for {len(predictions)} predictions.")
        right = [
            _MATCHES[match](text.strip().casefold(), [reference.strip().casefold() for reference in wanted])
            for text, wanted in zip(predictions, references, strict=True)
        ]
        result: dict[str, Any] = share_right(right)
        if groups is not None:
            labels = dict.fromkeys(groups)
            result["by_group"] = {
                label: share_right([own for own, group in zip(right, groups, strict=True) if group == label])
                for label in labels
            }
        return result
