"""Patched frequencies, spans and the chunked loss under FSDP2: two CPU processes, weights loaded over meta tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(("case", "loss"), [("yarn", "chunked"), ("yarn", "stock"), ("rerope", "chunked")])
def test_fsdp2(case, loss):
    if loss == "chunked" and torch.__version__ < (2, 13):
        pytest.skip("the chunked loss under FSDP needs torch 2.13; recipes refuse it before")
    script = str(Path(__file__).with_name("sharded_script.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, case, loss]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["kept"] and found["loss"] < 1e-6 and found["gradients"] < 1e-5
