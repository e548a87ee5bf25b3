"""Two processes that share the documents give the rows of one, to the last digit."""

import json
import os
import subprocess
import sys

import pytest


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ARGUMENTS = ["--model", "demo", "--method", "angle_clip", "--lengths", "1x,2x", "--max-documents", "5"]
ARGUMENTS += ["--task", "perplexity", "--task", "kv_retrieval:trials=3"]


def run(folder, *launcher):
    command = [
        sys.executable,
        *launcher,
        "-m",
        "rope_scaling.cli.main",
        "evaluate",
        *ARGUMENTS,
        "--output",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    return place, [run(place / "one"), run(place / "two", *TORCHRUN)]


def test_rows_of_two_processes_are_those_of_one(runs):
    place, _ = runs
    one, two = ((place / name / "rows.jsonl").read_text() for name in ("one", "two"))
    assert one == two and one.count("\n") > 30


def test_only_the_first_process_shows_and_writes(runs):
    place, (one, two) = runs
    assert two.stdout.count("kv_retrieval: answers right") == one.stdout.count("kv_retrieval: answers right") == 1
    assert {p.name for p in (place / "one").iterdir()} == {p.name for p in (place / "two").iterdir()}
    costs = [json.loads(line) for line in (place / "two" / "costs.jsonl").read_text().splitlines()]
    assert {cost["processes"] for cost in costs} == {2}


def test_an_error_in_one_process_stops_both(tmp_path):
    command = [sys.executable, *TORCHRUN, "-m", "rope_scaling.cli.main", "evaluate", "--model", "demo"]
    command += ["--method", "linear", "--task", "niah_multikey:depths=300", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode and "tokens more than the prompt" in done.stderr
    assert not (tmp_path / "out").exists()
