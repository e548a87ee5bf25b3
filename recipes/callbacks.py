"""What watches a run: losses by position, memory, Ctrl-C."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rope_scaling.eval.documents import Document
from rope_scaling.eval.formatting import length_name
from rope_scaling.eval.scoring.buckets import position_buckets
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.recipes.processes import any_process
from rope_scaling.training import PoseCollator


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


class Epochs(TrainerCallback):
    """Tells a collator which epoch begins."""

    def __init__(self, collator: PoseCollator):
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the step, saves and stops, in all processes; the second ends this one at once."""

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
        self.restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Processes receive the signal at different times, or one of them only, and saving takes all of them.
        self.asked = any_process(self.asked, args.device)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Puts back what handled the signal before; also after training that failed."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


def memory_gb() -> float:
    """Peak memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
