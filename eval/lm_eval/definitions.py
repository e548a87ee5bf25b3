"""lm-eval's tasks as it defines them, with documents of the length that is asked for.

- `ruler_cwe` gets the example that NVIDIA's RULER shows the model, and questions with several accepted answers
  (`ruler_qa_*`) count as right with any of them, as there; lm-eval drops the one and averages the other.
- BABILong is taken in the size of each length. lm-eval takes `0k` when nothing is said: facts without a haystack.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError, first_line
from rope_scaling.eval.extras import need


RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"),
)
BABILONG = tuple(f"babilong_qa{number}" for number in range(1, 6))
"""The tasks whose facts are hidden in a haystack; the others of the twenty are short."""
_ONE_IS_ENOUGH = ("ruler_qa_squad", "ruler_qa_hotpot")
_BABILONG_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Thousands of GPT-2's tokens."""


def check_installed() -> None:
    """Raises `RopeScalingError` with the name of the extra if lm-eval or what RULER needs is missing."""
    need("The harness", "harness", "lm_eval", "wonderwords", "nltk")


@cache
def manager() -> Any:
    """All of lm-eval's tasks: reading the thousands of them takes it some twenty seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def plain_task(name: str) -> Any:
    """lm-eval's task as it is.

    Raises:
        RopeScalingError: it cannot be loaded, or measures perplexity over windows.
    """
    task = load_task(manager(), name)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise RopeScalingError(
            f"{name!r} measures perplexity over disjoint windows, most tokens of which have little before them; that "
            "says nothing of long context. Use the perplexity task of `rope-scaling evaluate`."
        )
    return task


def babilong_task(name: str, length: int) -> Any:
    """BABILong's task in the largest size that is no longer than `length` tokens.

    Raises:
        RopeScalingError: the task has no haystack, or there is no such size.
    """
    if name not in BABILONG:
        raise RopeScalingError(
            f"{name!r} has no long texts, only its facts; those that have: {', '.join(BABILONG)} (`babilong_longctx`)."
        )
    size = max((size for size in _BABILONG_SIZES if size * 1024 <= length), default=None)
    if size is None or length >= 2048 * _BABILONG_SIZES[-1]:
        raise RopeScalingError(
            f"BABILong has texts of 1,024 to {1024 * _BABILONG_SIZES[-1]:,} tokens; got a length of {length}. Leave "
            "the task or the length out."
        )
    return load_task(family_manager("babilong", max_seq_lengths=f"{size}k"), name)


def ruler_task(name: str, documents: list[dict[str, Any]]) -> Any:
    """RULER's task with documents made already, and NVIDIA's prompt and score where lm-eval departs from them."""
    import datasets

    given: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
    }
    if name == "ruler_cwe":
        given["doc_to_text"] = "{{input_example}}\n{{input}}"
    if name in _ONE_IS_ENOUGH:
        given["process_results"] = _any_answer
    # Alone, a mapping would be a task of its own; as a member of a group, it changes lm-eval's task of that name.
    return family_manager("ruler").load([{"group": "given", "task": [given]}])["tasks"][name]


@cache
def family_manager(family: str, **metadata: Any) -> Any:
    """One folder of lm-eval's tasks, in place of all; `metadata` goes to what makes their documents."""
    from lm_eval import tasks

    return tasks.TaskManager(
        include_path=str(Path(tasks.__file__).parent / family), include_defaults=False, metadata=metadata or None
    )


def load_task(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RopeScalingError(f"lm-eval cannot load the task {name!r}: {reason}") from error


def _any_answer(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    text = results[0].lower()
    return {str(document["max_length"]): float(any(answer.lower() in text for answer in document["outputs"]))}
