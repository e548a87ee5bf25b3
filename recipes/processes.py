"""What the processes of one run hold, share and agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import distributed
from transformers.integrations import is_fsdp_enabled

from rope_scaling.errors import RopeScalingError


T = TypeVar("T")


def rank() -> int:
    """The number of this process among all, from 0."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all have to call it, at the same step."""
    if not _several():
        return flag
    flags = torch.tensor(int(flag), device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def gather(value: T) -> list[T]:
    """The value of every process, in all of them, however long one of them takes.

    Ordinary collectives give up after `training.ddp_timeout` (half an hour), which measuring may take.
    """
    if not _several():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value, group=patient_group())
    return values


@cache
def patient_group() -> Any:
    """All processes as a group whose collectives wait for a week; made while all are in step."""
    return distributed.new_group(backend="gloo", timeout=timedelta(days=7)) if _several() else None


def only_first_loads() -> bool:
    """Whether weights are sharded and come from the first process, so that the others need none of their own.

    Raises:
        RopeScalingError: so launched for the older FSDP, which would shard weights that were never loaded.
    """
    if not is_fsdp_enabled():  # which asks for `fsdp_cpu_ram_efficient_loading` too
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RopeScalingError(
            "Recipes are sharded by FSDP2, and this launch asks for FSDP1 with `fsdp_cpu_ram_efficient_loading`. Set "
            "`fsdp_version: 2` in the accelerate config, as in `recipes/accelerate/fsdp2.yaml`."
        )
    return True


@contextmanager
def whole_weights() -> Iterator[None]:
    """Loading within gives every process the weights; otherwise Transformers leaves them to the first of a machine."""
    before = os.environ.get(_ENV)
    os.environ[_ENV] = "false"
    try:
        yield
    finally:
        os.environ.pop(_ENV)
        os.environ.update({_ENV: before} if before is not None else {})


_ENV = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
