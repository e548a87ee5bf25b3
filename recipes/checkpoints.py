"""Checkpoints that are whole, and which run they belong to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rope_scaling.errors import RopeScalingError, cause_of, first_line, system_error
from rope_scaling.eval.files import write_atomically
from rope_scaling.eval.scoring.identity import frequencies_sha256
from rope_scaling.hf.patch import patch_record
from rope_scaling.recipes.config import Recipe


MARKER = "rope_scaling.json"
"""Written last into a checkpoint: what it belongs to. A checkpoint without it was interrupted while being saved."""


def check_folder(folder: Path, resume: bool) -> None:
    """Refuses a folder that another run would be written over; one stopped before its first step is none."""
    if (folder / "rows.jsonl").exists():
        raise RopeScalingError(f"The run in {str(folder)!r} is finished. Give another `--output-dir`.")
    if not resume and folder.exists() and any(file.name != "curves" for file in folder.iterdir()):
        hint = ", or add `--resume` to go on" if any(folder.glob("checkpoint-*")) else ""
        raise RopeScalingError(f"The output folder {str(folder)!r} exists and is not empty. Give a new one{hint}.")


def run_facts(recipe: Recipe, model: Any, dataset: Any) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint of other facts is not resumed."""
    record = patch_record(model)
    settings = {"data": asdict(recipe.data), "lora": recipe.lora and asdict(recipe.lora), "s2": recipe.s2_group_size}
    digest = hashlib.sha256(str(settings).encode())
    if hasattr(dataset, "__len__"):
        digest.update(
            str([dataset[i]["input_ids"] for i in range(0, len(dataset), max(len(dataset) // 64, 1))]).encode()
        )
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "patch": None if record is None else {key: record[key] for key in ("methods", "target_length")},
        "frequencies": frequencies_sha256(model),
        "settings_and_data_sha256": digest.hexdigest()[:16],
    }


@contextmanager
def saving(folder: Path, step: int = 0) -> Iterator[None]:
    """Names a disk that cannot be written to, and removes the checkpoint of that step if it is not whole.

    Args:
        folder (`Path`): That of the run.
        step (`int`): Where training is, if it has begun.

    Raises:
        RopeScalingError: writing failed; other errors pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RopeScalingError) or not _of_the_disk(error):
            raise
        partial = folder / f"checkpoint-{step}"
        if not (partial / MARKER).exists():
            shutil.rmtree(partial, ignore_errors=True)
        cause = cause_of(error)
        remedy = cause.remedy if cause.kind == "disk" else "Check the disk."
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = f"It has {shutil.disk_usage(place).free / 2**30:.1f} GB free."
        when = f" at step {step}" if step else ""
        raise RopeScalingError(
            f"Saving failed{when}: {first_line(error)} {remedy} {free} {how_to_go_on(folder)}"
        ) from error


def _of_the_disk(error: Exception) -> bool:
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITERS)
    return told or (system_error(error) is not None and cause_of(error).kind != "network")


_WRITERS = ("inline_container", "iostream error", "PytorchStreamWriter", "file write failed", "Parent directory")
"""What PyTorch says when a file cannot be written; it drops the system's own error."""


def how_to_go_on(folder: Path) -> str:
    """What to do with a run that stopped, in one sentence."""
    if any(folder.glob(f"checkpoint-*/{MARKER}")):
        return "The last whole checkpoint is untouched; add `--resume` to go on from it."
    return "There is no whole checkpoint yet; start again in a new `--output-dir`."


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint when all of it is on disk."""

    def __init__(self, trainer: Any, facts: dict[str, Any]):
        self.trainer, self.facts = trainer, facts

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            with saving(folder.parent, state.global_step):
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
