"""Why training stopped, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError, cause_of
from rope_scaling.recipes.checkpoints import how_to_go_on


_OWN_CLASS = re.compile(r"^(?:\w+\.)*RopeScalingError: ")
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


def stopped(trainer: Any, error: Exception) -> RopeScalingError | None:
    """What to raise for a training loop that failed; `None` where nothing is known of the error."""
    cause = cause_of(error)
    if cause.kind == "other" and not isinstance(error, (OSError, RopeScalingError)):
        return None
    reason = _OWN_CLASS.sub("", cause.reason)
    remedy = "" if isinstance(error, RopeScalingError) else _REMEDIES.get(cause.kind, cause.remedy)
    way_on = how_to_go_on(Path(str(trainer.args.output_dir)))
    told = filter(None, (f"Training stopped at step {trainer.state.global_step}: {reason}", remedy, way_on))
    return RopeScalingError(" ".join(told))
