"""Run by test_train.py in two processes: a slow measurement, or what each of them gives to be sharded."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

import torch
from accelerate import PartialState

from rope_scaling.recipes import measure, train
from rope_scaling.recipes.config import read_recipe
from rope_scaling.recipes.processes import only_first_loads, rank


def slow(arguments):
    plain = measure.nll_curve

    def nll_curve(*given):
        time.sleep(6 if rank() == 0 else 0)
        return plain(*given)

    measure.nll_curve = nll_curve
    PartialState(cpu=True, timeout=timedelta(seconds=10))  # on a CPU, the Trainer does not pass `ddp_timeout` on
    train.main(arguments)


def sharded(arguments):
    from sharded_script import prepared

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    torch.distributed.init_process_group("gloo")
    assert only_first_loads()
    recipe = read_recipe(arguments[0], arguments[1:])
    rehearsal = train.rehearse(recipe)
    model, wanted = None, None
    ids = torch.arange(100).reshape(2, 50)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if rank() == 0:
        model = train.load(recipe, torch.device("cpu"), 256)
        train.apply_patch(recipe, model)
        wanted = float(model(**inputs).loss)
    model = train.unsharded(model, rehearsal)
    held = sum(one.numel() for one in model.parameters() if not one.is_meta)
    trainable = prepared(train.prepare(recipe, model), rank(), 2)
    loss = trainable(**inputs).loss
    loss.backward()
    finite = all(
        bool(torch.isfinite(one.grad.full_tensor()).all()) for one in trainable.parameters() if one.requires_grad
    )
    line = json.dumps({"rank": rank(), "held": held, "wanted": wanted, "loss": float(loss), "finite": finite})
    sys.stdout.write(line + "\n")  # in one piece, since two processes write here


{"slow": slow, "sharded": sharded}[sys.argv[1]](sys.argv[2:])
