"""lm-eval's tasks (https://github.com/EleutherAI/lm-evaluation-harness) on the model in memory, document by document.

What goes wrong in silence when a long-context model is handed over as it is, does not here:

- A prompt that is longer than the model is given room for is left out and counted, or an error. lm-eval cuts its
  beginning off, needle and instruction first.
- RULER and BABILong are run length by length. With several lengths at once, `limit` scores the first one only.
- Documents of other tasks are counted at the shortest length that holds them, so that texts beyond the trained length
  are not averaged with shorter ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, lines_by_length, values_text
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.lm_eval.definitions import (
    BABILONG,
    RULER,
    babilong_task,
    check_installed,
    manager,
    plain_task,
    ruler_task,
)
from rope_scaling.eval.lm_eval.model import Bench
from rope_scaling.eval.lm_eval.ruler import make_ruler
from rope_scaling.eval.scoring.identity import tokenizer_sha256
from rope_scaling.eval.stats import paired
from rope_scaling.eval.tasks.base import Scores, Task
from rope_scaling.eval.tasks.source import Source


_RULER_ROOM = 128
"""Tokens beyond a RULER prompt's length for the answer: lm-eval counts some prompts without it."""
_BABILONG_ROOM = 0.25
"""Of the length: BABILong counts GPT-2's tokens, and neither instruction nor examples."""
_LONG_GROUPS = {"ruler": RULER, "babilong_longctx": BABILONG}
"""Groups whose members are known without loading what they would load at other lengths."""
_SEED = 0
"""Of examples in prompts, and of tasks that draw samples."""


@dataclass(frozen=True)
class HarnessDocument:
    """One document of one of lm-eval's tasks."""

    name: str
    task: Any = field(repr=False)
    """The task's object, with documents of one length."""
    bench: Bench = field(repr=False)
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

    skipped_because: ClassVar[str] = "took more tokens than the longest length, with their answers"
    keeps: ClassVar[str] = "ruler"
    recognised_by: ClassVar[str] = "harness"

    name: str  # type: ignore[misc]
    tokenizer: str
    """Folder or hub id of the tokenizer: RULER's generators take no object."""
    samples: int = 50
    """Documents of each length."""
    timeout: int = 3600
    """Seconds that making RULER's documents of one length may take."""

    def settings(self) -> dict[str, Any]:
        """The number of documents: where a tokenizer is and how long things may take change no row."""
        return {"samples": self.samples}

    def scored_with(self) -> dict[str, Any]:
        """lm-eval's version: it makes prompts and metrics."""
        return {"lm_eval": version("lm_eval")}

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[HarnessDocument], int]:
        """The first documents of each length, and how many were passed over for being too long for all of them."""
        if self.samples < 1:
            raise RopeScalingError(f"`samples` must be positive; got {self.samples}.")
        bench = Bench.of(source)
        if self.name not in RULER and not self.name.startswith("babilong_"):
            return self._fitting(plain_task(self.name), bench, {length: length for length in config.lengths})
        items: list[HarnessDocument] = []
        skipped = 0
        for length in config.lengths:
            if self.name in RULER:
                task = ruler_task(self.name, self._ruler(length, source, config))
                room = length + _RULER_ROOM
                items += [self._document(task, bench, index, length, room) for index in self._first(task)]
            else:
                room = length + int(_BABILONG_ROOM * length)
                more, longer = self._fitting(babilong_task(self.name, length), bench, {length: room})
                items, skipped = items + more, skipped + longer
        return items, skipped

    def score(self, model: Any, item: HarnessDocument, config: EvaluationConfig) -> np.ndarray:
        """The document's metrics, in the order of its `metrics`."""
        return _score(model, item, None)

    def score_cropped(
        self, model: Any, item: HarnessDocument, plain: np.ndarray, config: EvaluationConfig
    ) -> np.ndarray:
        """With the last tokens of each prompt that fit in the trained length."""
        if item.max_length <= config.trained_length:
            return plain
        return _score(model, item, config.trained_length)

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
                rows.append(row | paired("score", own, plain, cropped, ones, config.seed))
        return rows

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """Scores by length, a table for each metric; RULER calls its only metric by the length."""
        tables = []
        for metric in dict.fromkeys(row["metric"] for row in rows if row["metric"] != str(row["to"])):
            part = [row for row in rows if row["metric"] == metric]
            title = f"{rows[0]['task']}, {metric} ({values_text(part, 'harness')}), 95% interval"
            tables.append(Table(title, lines_by_length(part, "harness", _score_text)))
        if part := [row for row in rows if row["metric"] == str(row["to"])]:
            title = f"{rows[0]['task']} ({values_text(part, 'harness')}, a subset of RULER), 95% interval"
            tables.append(Table(title, lines_by_length(part, "harness", _score_text)))
        return tables

    def _ruler(self, length: int, source: Source, config: EvaluationConfig) -> list[dict[str, Any]]:
        """RULER's documents of one length."""
        return make_ruler(
            self.name,
            length,
            self.tokenizer,
            tokenizer_sha256(source.tokenizer),
            config.seed,
            self.timeout,
            source.folder and source.folder / self.keeps,
            source.shared,
        )

    def _fitting(self, task: Any, bench: Bench, rooms: dict[int, int]) -> tuple[list[HarnessDocument], int]:
        """Documents at the shortest length whose room holds prompt and answer, up to `samples` a length."""
        fitting: dict[int, list[HarnessDocument]] = {length: [] for length in rooms}
        longer: list[int] = []
        for index, tokens in enumerate(_token_counts(task, bench.tokenizer)):
            length = next((length for length, room in rooms.items() if tokens <= room), None)
            if length is None:
                longer.append(tokens)
            elif len(fitting[length]) < self.samples:
                fitting[length].append(self._document(task, bench, index, length, rooms[length]))
            if all(len(documents) == self.samples for documents in fitting.values()):
                break
        if not any(fitting.values()):
            raise RopeScalingError(
                f"No document of {self.name!r} fits in {max(rooms.values())} tokens; the shortest takes "
                f"{min(longer, default=0)} with its answer, and lm-eval would cut its beginning off. Give longer "
                "`--lengths`."
            )
        return [item for documents in fitting.values() for item in documents], len(longer)

    def _first(self, task: Any) -> range:
        return range(min(self.samples, len(task.eval_docs)))

    def _document(self, task: Any, bench: Bench, index: int, length: int, max_length: int) -> HarnessDocument:
        # RULER calls its only metric by the length.
        metrics = (str(length),) if self.name in RULER else tuple(sorted(task.aggregation()))
        content = repr((self.name, max_length, sorted(task.eval_docs[index].items())))
        name = f"{self.name}, {length} tokens, document {index}"
        return HarnessDocument(name, task, bench, index, length, max_length, hash_of(content.encode()), metrics)


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
        if name in _LONG_GROUPS or name in (*RULER, *BABILONG):
            members += _LONG_GROUPS.get(name, [name])
        elif name in manager().all_subtasks:
            members.append(name)
        elif name in manager().all_groups or name in manager().all_tags:
            members += sorted(manager().load([name])["tasks"])
        else:
            raise unknown_name("lm-eval task", name, manager().all_tasks)
    return [HarnessTask(name=name, **settings) for name in dict.fromkeys(members)]


def _score_text(row: Row) -> str:
    low, high = row["score_low"], row["score_high"]
    return f"{row['score']:.3f}" if low is None else f"{row['score']:.3f} [{low:.3f},{high:.3f}]"


def _token_counts(task: Any, tokenizer: Any) -> Iterator[int]:
    """Of each document, tokens of the longest prompt with what is generated or scored after it."""
    encode = tokenizer.encode
    config = task.config
    for index, document in enumerate(task.eval_docs):
        task.set_fewshot_seed(seed=_SEED)
        context = task.fewshot_context(
            document, num_fewshot=config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(document)
        )
        made = task.construct_requests(doc=document, ctx=context, metadata=(config.task, index, config.repeats))
        counts = []
        for request in made if isinstance(made, list) else [made]:
            prompt, answer = request.args
            after = answer.get("max_gen_toks", 256) if isinstance(answer, dict) else len(encode(answer))
            counts.append(len(encode(prompt)) + after)
        yield max(counts)


def _score(model: Any, item: HarnessDocument, crop: int | None) -> np.ndarray:
    # `simple_evaluate` reads lm-eval's thousands of tasks again in every call.
    from lm_eval.api import task as building
    from lm_eval.evaluator import evaluate
    from transformers import set_seed

    name = item.task.config.task
    set_seed(_SEED)
    item.task.set_fewshot_seed(seed=_SEED)
    with mock.patch.object(building, "tqdm", lambda documents, **_: documents):  # one document needs no bar
        result: Any = evaluate(
            item.bench.lm(model, item.max_length, crop),
            {"tasks": {name: item.task}, "groups": {}},
            samples={name: [item.index]},
            bootstrap_iters=0,
        )
    (sample,) = result["samples"][name][:1]
    values = [sample.get(metric) for metric in item.metrics]
    if not all(isinstance(value, int | float) for value in values):
        raise RopeScalingError(
            f"The metrics of {name!r} are not one number per document "
            f"({dict(zip(item.metrics, values, strict=True))}), so they cannot be compared "
            "document by document. Save the patched model and run lm-eval itself."
        )
    return np.array(values, dtype=np.float64)
