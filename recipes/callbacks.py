"""What watches a run: losses by position, checkpoints that are whole, Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.documents import Document
from rope_scaling.eval.perplexity import nll_curve
from rope_scaling.eval.report import length_name
from rope_scaling.eval.rows import position_buckets, write_atomically


MARKER = "rope_scaling.json"
"""Written last into a checkpoint: what it belongs to. A checkpoint without it was interrupted while being saved."""


class PositionLosses(TrainerCallback):
    """Logs the loss of every bucket of positions while training."""

    def __init__(
        self, trainer: Any, documents: list[Document], lengths: list[int], trained: int, every: int, chunk_size: int
    ):
        self.trainer, self.documents, self.every, self.chunk_size = trainer, documents, every, chunk_size
        self.lengths, self.trained = lengths, trained

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every:
            return
        # Every rank runs it: a sharded model needs all of them.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        training = model.training
        model.eval()
        try:
            with self.trainer.compute_loss_context_manager():
                curves = [
                    nll_curve(model, document.ids[None], self.chunk_size)[0].numpy() for document in self.documents
                ]
        finally:
            model.train(training)
        logs = {}
        for start, end in position_buckets(self.lengths, self.trained):
            parts = [curve[max(start - 1, 0) : end - 1] for curve in curves if len(curve) >= end - 1]
            if parts:
                name = f"({length_name(start, self.trained)},{length_name(end, self.trained)}]"
                logs[f"eval_nll_{name}"] = float(np.concatenate(parts).mean())
        self.trainer.log(logs)


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is on disk."""

    def __init__(self, trainer: Any, facts: dict[str, Any]):
        self.trainer, self.facts = trainer, facts

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_atomically(folder / MARKER, (json.dumps(self.facts, indent=1, sort_keys=True) + "\n").encode())


def last_checkpoint(folder: Path, facts: dict[str, Any]) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        RopeScalingError: there is none, or it belongs to a run of other settings.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / MARKER).exists()]
    if not whole:
        broken = f" ({len(found)} interrupted while being saved)" if found else ""
        raise RopeScalingError(f"There is no whole checkpoint in {str(folder)!r}{broken}. Start without `--resume`.")
    recorded = json.loads((whole[-1] / MARKER).read_text(encoding="utf-8"))
    if different := [key for key in sorted(facts.keys() | recorded.keys()) if recorded.get(key) != facts.get(key)]:
        changes = "; ".join(f"{key}: there {recorded.get(key)!r}, now {facts.get(key)!r}" for key in different)
        raise RopeScalingError(
            f"The checkpoint {str(whole[-1])!r} belongs to another run ({changes}). Resume with the settings it was "
            "started with, or give another `--output-dir`."
        )
    return whole[-1]


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the step, saves and stops; the second ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        try:
            self._before = signal.signal(signal.SIGINT, self._stop)
        except ValueError:  # not in the main thread, where signals are somebody else's
            self._before = None

    def _stop(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before or signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def memory_gb() -> float:
    """Peak memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
