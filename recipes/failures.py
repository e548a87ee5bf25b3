"""Why a run stopped, as what it is, and how to go on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError, cause_of, first_line, system_error
from rope_scaling.recipes.checkpoints import MARKER


_OWN_CLASS = re.compile(r"^(?:\w+\.)*RopeScalingError: ")
_WRITERS = ("inline_container", "iostream error", "PytorchStreamWriter", "file write failed", "Parent directory")
"""What PyTorch says when a file cannot be written; it drops the system's own error."""

_REMEDIES = {
    "memory": (
        "Give a smaller `training.per_device_train_batch_size`, `activation_checkpointing=true`, or train adapters "
        "(`lora={}`)."
    ),
    "file": "Put the file back.",
    "network": "Check the connection.",
}


def from_worker(error: BaseException) -> bool:
    """Whether a data loader's worker raised it, with its traceback for a message."""
    return "in DataLoader worker process" in str(error)


def stopped(trainer: Any, error: Exception) -> Exception:
    """What to raise for a training loop that failed: the error itself where nothing is known of it."""
    cause = cause_of(error)
    if cause.kind == "other" and not isinstance(error, (OSError, RopeScalingError)):
        return error
    reason = _OWN_CLASS.sub("", cause.reason)
    remedy = "" if isinstance(error, RopeScalingError) else _REMEDIES.get(cause.kind, cause.remedy)
    return RopeScalingError(
        f"Training stopped at step {trainer.state.global_step}: {reason} {remedy} {_way_on(trainer)}"
    )


@contextmanager
def saving(trainer: Any) -> Iterator[None]:
    """Names a disk that cannot be written to, and removes the half-written checkpoint.

    Raises:
        RopeScalingError: writing failed; other errors pass.
    """
    folder, step = Path(str(trainer.args.output_dir)), trainer.state.global_step
    try:
        yield
    except Exception as error:
        if isinstance(error, RopeScalingError) or not _of_the_disk(error):
            raise
        partial = folder / f"checkpoint-{step}"
        if trainer.args.should_save and partial.exists() and not (partial / MARKER).exists():
            shutil.rmtree(partial, ignore_errors=True)
        cause = cause_of(error)
        free = shutil.disk_usage(folder).free / 2**30
        remedy = cause.remedy if cause.kind == "disk" else "Check the disk."
        what = f"Saving failed at step {step}: {first_line(error)} {remedy} It has {free:.1f} GB free."
        raise RopeScalingError(f"{what} {_way_on(trainer)}") from error


def _of_the_disk(error: Exception) -> bool:
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITERS)
    return told or (system_error(error) is not None and cause_of(error).kind != "network")


def _way_on(trainer: Any) -> str:
    if any(Path(str(trainer.args.output_dir)).glob(f"checkpoint-*/{MARKER}")):
        return "The last whole checkpoint is untouched; add `--resume` to go on from it."
    return "There is no whole checkpoint yet; start again in a new `--output-dir`."
