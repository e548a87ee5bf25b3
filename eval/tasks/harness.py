"""lm-eval's tasks (https://github.com/EleutherAI/lm-evaluation-harness) on the model in memory, document by document.

What goes wrong in silence when a long-context model is handed over as it is, does not here:

- A prompt that is longer than `max_length` is an error. lm-eval cuts its beginning off, needle and instruction first.
- RULER is run length by length. With several lengths at once, `limit` scores the first one only.
- RULER's documents are made in a process of their own with one seed, so they do not depend on what was made before,
  are kept, and a generator that never ends (`ruler_vt` and `ruler_cwe` at short lengths) is stopped.
- `ruler_cwe` gets the example that NVIDIA's RULER shows the model, and questions with several accepted answers
  (`ruler_qa_*`) count as right with any of them, as there; lm-eval drops the one and averages the other.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.intervals import estimate
from rope_scaling.eval.rows import hash_of, write_atomically
from rope_scaling.eval.tasks.base import Row, Scores, Source, Task


RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"),
)
_ENDLESS_BELOW = {"ruler_vt": 2048, "ruler_cwe": 2048}
"""Lengths at which lm-eval's generators find nothing short enough and try for ever."""
_ROOM = 128
"""Tokens beyond a RULER prompt's length for the answer: lm-eval counts some prompts without it."""
_ONE_IS_ENOUGH = ("ruler_qa_squad", "ruler_qa_hotpot")


@dataclass(frozen=True)
class HarnessDocument:
    """One document of one of lm-eval's tasks."""

    name: str
    task: Any = field(repr=False)
    """The task's object, with documents of one length."""
    index: int
    length: int
    """Tokens of prompt and answer: RULER's length, or what the model is given at most."""
    max_length: int
    sha256: str
    metrics: tuple[str, ...]

    @property
    def cost(self) -> int:
        """About the tokens that go through the model."""
        return self.length


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Task):
    """One of lm-eval's tasks by its name there."""

    name: str  # type: ignore[misc]
    tokenizer: str
    """Folder or hub id of the tokenizer: RULER's generators take no object."""
    samples: int = 50
    """Documents of each length."""
    timeout: int = 3600
    """Seconds that making RULER's documents of one length may take."""

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[HarnessDocument], int]:
        """The first documents of each length."""
        if self.samples < 1:
            raise RopeScalingError(f"`samples` must be positive; got {self.samples}.")
        if self.name not in RULER:
            return self._documents(_plain_task(self.name), config.lengths[-1], config.lengths[-1]), 0
        items: list[HarnessDocument] = []
        for length in config.lengths:
            if length < _ENDLESS_BELOW.get(self.name, 0):
                raise RopeScalingError(
                    f"lm-eval's generator of {self.name!r} does not end at {length} tokens; it takes "
                    f"{_ENDLESS_BELOW[self.name]} or more. Leave the task or the length out."
                )
            documents = self._make(length, config.seed, source.folder)
            items += self._documents(_ruler_task(self.name, documents), length, length + _ROOM)
        return items, 0

    def score(self, model: Any, item: HarnessDocument, config: EvaluationConfig) -> np.ndarray:
        """The document's metrics, in the order of its `metrics`."""
        return _score(model, self.tokenizer, item, None)

    def score_cropped(
        self, model: Any, item: HarnessDocument, plain: np.ndarray, config: EvaluationConfig
    ) -> np.ndarray:
        """With the last tokens of each prompt that fit in the trained length."""
        if item.max_length <= config.trained_length:
            return plain
        return _score(model, self.tokenizer, item, config.trained_length)

    def rows(self, items: Sequence[HarnessDocument], scores: Scores, config: EvaluationConfig) -> list[Row]:
        """A row a length and metric."""
        rows = []
        for length in dict.fromkeys(item.length for item in items):
            chosen = [index for index, item in enumerate(items) if item.length == length]
            ones = np.ones(len(chosen))
            for at, metric in enumerate(items[chosen[0]].metrics):
                own, plain, cropped = (
                    np.array([values[index][at] for index in chosen])
                    for values in (scores.own, scores.unpatched, scores.cropping)
                )
                row: Row = {"measure": "harness", "to": length, "metric": metric, "documents": len(chosen)}
                row |= {"harness": f"lm-eval {version('lm_eval')}"}
                row |= estimate(own, ones, config.seed).fields("score")
                row |= estimate(own - plain, ones, config.seed).fields("difference")
                row |= estimate(own - cropped, ones, config.seed).fields("to_cropping")
                rows.append(row)
        return rows

    def _documents(self, task: Any, length: int, max_length: int) -> list[HarnessDocument]:
        documents = list(task.eval_docs)[: self.samples]
        # RULER calls its only metric by the length.
        metrics = (str(length),) if self.name in RULER else tuple(sorted(task.aggregation()))
        return [
            HarnessDocument(
                f"{self.name}, {length} tokens, document {index}",
                task,
                index,
                length,
                max_length,
                hash_of(repr((self.name, max_length, sorted(document.items()))).encode()),
                metrics,
            )
            for index, document in enumerate(documents)
        ]

    def _make(self, length: int, seed: int, folder: Path | None) -> list[dict[str, Any]]:
        """RULER's documents of one length, from `folder` if they were made before."""
        key = hash_of(repr((self.name, length, seed, self.tokenizer, version("lm_eval"))).encode())
        path = None if folder is None else folder / "ruler" / f"{self.name}-{length}-{key}.json"
        if path is not None and path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        command = [sys.executable, "-m", __name__, self.name, str(length), self.tokenizer, str(seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired:
            raise RopeScalingError(
                f"lm-eval's generator of {self.name!r} did not end within {self.timeout} seconds at {length} tokens. "
                "Leave it out, give a greater `--timeout`, or longer `--lengths`."
            ) from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RopeScalingError(f"lm-eval could not make the documents of {self.name!r} at {length} tokens: {last}")
        text = done.stdout.splitlines()[-1]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
        return json.loads(text)


def harness_tasks(names: Sequence[str], **settings: Any) -> list[HarnessTask]:
    """Tasks by lm-eval's names; groups stand for their members.

    Args:
        names (list of `str`): As in `ruler`, `niah_single_1`, `longbench`, `babilong_qa1`.
        settings: Other fields of `HarnessTask`.

    Raises:
        RopeScalingError: lm-eval is not installed, or has no such task.
    """
    check_installed()
    members: list[str] = []
    for name in names:
        if name in ("ruler", *RULER):
            members += RULER if name == "ruler" else [name]
        elif name in _manager().all_subtasks:
            members.append(name)
        elif name in _manager().all_groups or name in _manager().all_tags:
            members += sorted(_manager().load([name])["tasks"])
        else:
            raise unknown_name("lm-eval task", name, _manager().all_tasks)
    return [HarnessTask(name=name, **settings) for name in dict.fromkeys(members)]


def check_installed() -> None:
    """Raises `RopeScalingError` with the name of the extra if lm-eval or what RULER needs is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("lm_eval", "wonderwords", "nltk") if find_spec(name) is None]
    if missing:
        raise RopeScalingError(f"The harness needs {' and '.join(missing)}: pip install 'rope-scaling[harness]'.")


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@cache
def _ruler_manager(length: int | None = None, tokenizer: str = "") -> Any:
    """RULER's tasks alone: reading the thousands of others takes lm-eval some twenty seconds."""
    from lm_eval import tasks

    return tasks.TaskManager(
        include_path=str(Path(tasks.__file__).parent / "ruler"),
        include_defaults=False,
        metadata=None if length is None else {"max_seq_lengths": [length], "tokenizer": tokenizer},
    )


def _plain_task(name: str) -> Any:
    try:
        task = _manager().load([name])["tasks"][name]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RopeScalingError(f"lm-eval cannot load the task {name!r}: {reason}") from error
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise RopeScalingError(
            f"{name!r} measures perplexity over disjoint windows, most tokens of which have little before them; that "
            "says nothing of long context. Use the perplexity task of `rope-scaling evaluate`."
        )
    return task


def _ruler_task(name: str, documents: list[dict[str, Any]]) -> Any:
    """lm-eval's task with documents made already, and NVIDIA's prompt and score where it departs from them."""
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
    return _ruler_manager().load([{"group": "given", "task": [given]}])["tasks"][name]


def _any_answer(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    text = results[0].lower()
    return {str(document["max_length"]): float(any(one.lower() in text for one in document["outputs"]))}


def _score(model: Any, tokenizer: str, item: HarnessDocument, crop: int | None) -> np.ndarray:
    from lm_eval import simple_evaluate

    name = item.task.config.task
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 0)
    result = simple_evaluate(
        _lm(model, tokenizer, item.max_length, crop),
        tasks=[item.task],
        samples={name: [item.index]},
        bootstrap_iters=0,
        **seeds,
    )
    (sample,) = result["samples"][name][:1]
    values = [sample.get(metric) for metric in item.metrics]
    if not all(isinstance(value, int | float) for value in values):
        raise RopeScalingError(
            f"The metrics of {name!r} are no numbers a document ({dict(zip(item.metrics, values, strict=True))}), so "
            "they cannot be compared document by document. Save the patched model and run lm-eval itself."
        )
    return np.array(values, dtype=np.float64)


def _lm(model: Any, tokenizer: str, max_length: int, crop: int | None) -> Any:
    """lm-eval's own class around the model, which refuses what it would cut, or cuts to `crop` tokens on purpose."""
    from lm_eval.models.huggingface import HFLM

    from rope_scaling.hf.loading import load_tokenizer

    class Lm(HFLM):
        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=None, **kwargs)
            if left_truncate_len and ids.shape[1] > left_truncate_len:
                _check_cut(crop, ids.shape[1], left_truncate_len)
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            longest = max(len(context) + len(answer) for _, context, answer in requests)
            if longest > self.max_length + 1:
                _check_cut(crop, longest, self.max_length)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    loaded = load_tokenizer(tokenizer)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return Lm(pretrained=model, tokenizer=loaded, max_length=crop or max_length, batch_size=1)


def _check_cut(crop: int | None, tokens: int, room: int) -> None:
    if crop is None:
        raise RopeScalingError(
            f"A prompt of {tokens} tokens does not fit in {room}; lm-eval would cut its beginning off. Give longer "
            "`--lengths`."
        )


def main(name: str, length: str, tokenizer: str, seed: str) -> None:
    """Makes RULER's documents of one length and prints them as one line of JSON; run as a process of its own."""
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))
    out = os.dup(1)
    os.dup2(2, 1)  # generators print
    task = _ruler_manager(int(length), tokenizer).load([name])["tasks"][name]
    with os.fdopen(out, "w") as stream:
        stream.write(json.dumps(list(task.eval_docs)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
