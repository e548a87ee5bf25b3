"""Evaluates methods on one loaded model by tasks, resumably, and writes rows and scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig, check_lengths
from rope_scaling.eval.files import SCHEMA, Row
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.methods import CROPPING, UNPATCHED, MethodSpec, with_yarn
from rope_scaling.eval.scoring.identity import environment, frequencies_sha256, method_sha256, weights_sha256
from rope_scaling.eval.scoring.nll import check_static
from rope_scaling.eval.scoring.saved_scores import SavedScores
from rope_scaling.eval.store import Store, run_settings
from rope_scaling.eval.suites import check_tasks
from rope_scaling.eval.tasks import Scores, Work
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.model_patch import applied_patch
from rope_scaling.hf.rotary import rotary_slots


Progress = Callable[[str, int], None]
"""Called with the method's label and the number of tokens just scored."""


def process_state() -> PartialState:
    """This process among those that share the work. Without an accelerator, accelerate has to be told."""
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass
class Measured:
    """What was measured of one method."""

    label: str
    facts: dict[str, Any]
    """What was in effect, read back from the model."""
    scores: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By task, one array an item."""
    stored: dict[str, str] = field(default_factory=dict)
    """By task, where in the output folder its scores are."""
    found: int = 0
    """Scores of an earlier run that were found again, of all tasks."""


def evaluate(
    model: torch.nn.Module,
    work: list[Work],
    methods: list[MethodSpec],
    config: EvaluationConfig,
    output: Path | None = None,
    progress: Progress = lambda label, tokens: None,
    fresh: bool = False,
) -> tuple[list[Row], list[Measured]]:
    """Measures the unpatched model, the cropping baseline, YaRN and every method on the same items.

    Under `torchrun` or `accelerate launch` the processes share the items; every process returns all rows, and the
    first one writes them.

    Args:
        model (`nn.Module`): The unpatched model; it is left as it was.
        work (list of `Work`): What `prepare` gave for some tasks.
        methods (list of `MethodSpec`): Methods beside the baselines.
        config (`EvaluationConfig`): Settings, recorded in every row.
        output (`Path`, *optional*): Folder for rows and scores. Scores that it holds of the same weights, tokenizer,
            method, item, settings and versions are not measured again, so an unfinished run is resumed at the item
            where it stopped. Rows of other methods and tasks in it are kept.
        progress (callable, *optional*): Called after every item.
        fresh (`bool`, *optional*): Measure everything again. Removes a run of other settings or weights in `output`.

    Returns:
        Rows as plain data, and the scores they were computed from.

    Raises:
        RopeScalingError: frequencies depend on the length, scores are not finite, or `output` holds another run.
    """
    check_lengths(config.lengths)
    check_static(model)
    check_tasks([part.task for part in work])
    slots = rotary_slots(model)
    if applied_patch(slots) is not None or hasattr(slots[0].config, RECORD_KEY):
        raise RopeScalingError(
            "This model is patched, so it cannot be its own baseline. Give the unpatched one (`unpatch(model)`), and "
            "the patch among the methods."
        )
    methods = with_yarn(methods, config.factor)
    labels = [UNPATCHED, CROPPING, *(spec.label for spec in methods)]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RopeScalingError(f"Each method can be listed only once; given twice: {', '.join(sorted(twice))}.")
    for spec in methods:
        # Anything wrong with a method shows before the first is measured.
        with spec.patched(model, config.factor):
            pass
    config = replace(config, weights_sha256=weights_sha256(model))
    store = Store(output if process_state().is_main_process else None, config, work, fresh)
    plain = _measure(model, work, MethodSpec(UNPATCHED, UNPATCHED, {}), config, store, progress)
    cropped = _measure(model, work, MethodSpec(CROPPING, UNPATCHED, {}), config, store, progress, plain)
    measured = [plain, cropped]
    for spec in methods:
        with spec.patched(model, config.factor):
            measured.append(_measure(model, work, spec, config, store, progress))
    rows = [row for part in work for row in _rows(part, measured, config)]
    store.finish(rows)
    return rows, measured


def _rows(part: Work, measured: list[Measured], config: EvaluationConfig) -> list[Row]:
    settings = part.task.settings()
    shared = {
        "schema": SCHEMA,
        "task": part.task.name,
        **({"settings": settings} if settings else {}),
        **vars(config),
        "documents_sha256": part.sha256,
        "documents_skipped": part.skipped,
        "tokenizer_sha256": part.tokenizer_sha256,
        "versions": environment(),
    }
    plain, cropped = (method.scores[part.task.name] for method in measured[:2])
    return [
        {**shared, **method.facts, "scores": method.stored[part.task.name], **row}
        for method in measured
        for row in part.task.rows(part.items, Scores(method.scores[part.task.name], plain, cropped), config)
    ]


def _measure(
    model: torch.nn.Module,
    work: list[Work],
    spec: MethodSpec,
    config: EvaluationConfig,
    store: Store,
    progress: Progress,
    plain: Measured | None = None,
) -> Measured:
    """The scores of the model as it is now; the cropping baseline's if scores of the unpatched model are given."""
    slot = read_description(model).slots[0]
    facts = {
        "method": spec.label,
        "arguments": spec.arguments if isinstance(spec.method, str) else {"together": spec.label, **spec.arguments},
        "in_effect": slot.method,
        "target_length": slot.target_length,
        "attention_factor": slot.attention_factor,
        "frequencies_sha256": frequencies_sha256(model),
        "method_sha256": method_sha256(model, config.lengths[-1]),
    }
    measured = Measured(spec.label, facts)
    for part in work:
        name = part.task.name
        measured.stored[name], saved = store.open(part, facts["method_sha256"], cropped=plain is not None)
        known = None if plain is None else plain.scores[name]

        def score(index: int, part: Work = part, known: list[np.ndarray] | None = known) -> np.ndarray:
            if known is None:
                return part.task.score(model, part.items[index], config)
            return part.task.score_cropped(model, part.items[index], known[index], config)

        def add_cost(tokens: int, seconds: float, name: str = name) -> None:
            # What cropping cost cannot be told: it takes most of its scores from the unpatched model.
            if plain is None:
                store.add_cost(_cost(spec.label, name, tokens, seconds))

        measured.found += sum(item.sha256 in saved.found for item in part.items)
        measured.scores[name] = _score_all(part, saved, score, spec.label, progress, add_cost)
    if frequencies_sha256(model) != facts["frequencies_sha256"]:
        raise RopeScalingError(
            f"The frequencies of {spec.label!r} changed while it was measured; its losses are not valid."
        )
    return measured


def _cost(label: str, task: str, tokens: int, seconds: float) -> Row:
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    cost = {"method": label, "task": task, "tokens": tokens, "seconds": round(seconds, 6)}
    return {**cost, **peak, "processes": process_state().num_processes}


def _score_all(
    part: Work,
    saved: SavedScores,
    score: Callable[[int], np.ndarray],
    label: str,
    progress: Progress,
    add_cost: Callable[[int, float], None],
) -> list[np.ndarray]:
    """Scores of all items; what is missing is shared among the processes, and kept as soon as it is there."""
    state = process_state()
    (scores,) = broadcast_object_list([saved.scores])
    hashes = [item.sha256 for item in part.items]
    missing = [index for index, name in enumerate(hashes) if name not in scores]
    for item in part.items:
        if item.sha256 in scores:
            progress(label, item.cost)
    for start in range(0, len(missing), state.num_processes):
        mine = missing[start + state.process_index : start + state.process_index + 1]
        started = time.monotonic()
        attempts = gather_object([_attempt(score, index, part, label) for index in mine])
        for index, values, error in attempts:
            if error:
                raise RopeScalingError(error)
            scores[hashes[index]] = values
            progress(label, part.items[index].cost)
            if state.is_main_process:
                saved.add(hashes[index], values)
        add_cost(sum(part.items[index].cost for index, _, _ in attempts), time.monotonic() - started)
    return [scores[name] for name in hashes]


def _attempt(score: Callable[[int], np.ndarray], index: int, part: Work, label: str) -> tuple[int, Any, str]:
    """An error is handed on, so that no process waits for one that has stopped."""
    try:
        values = score(index)
    except RopeScalingError as error:
        return index, None, str(error)
    if not np.isfinite(values).all():
        name = part.items[index].name
        return index, None, f"{label!r} gives losses that are not finite on {name!r}: nothing to average."
    return index, values, ""


def settings_sha256(config: EvaluationConfig, work: list[Work]) -> str:
    """A name for a run: runs of equal settings and versions share it, 8 hexadecimal digits."""
    return hash_of(json.dumps(run_settings(config, work), sort_keys=True).encode())[:8]
