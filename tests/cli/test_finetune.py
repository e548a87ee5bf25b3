"""`rope-scaling finetune` as a user runs it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import make_model

from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.recipes.config import recipe_names


def run(*arguments, cwd):
    environment = os.environ | {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rope_scaling.cli.main", "finetune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def own_recipe(folder):
    """A recipe on a tiny random model and a few lines of text."""
    make_model("llama", vocab_size=4096).save_pretrained(folder / "model")
    load_tokenizer("demo").save_pretrained(folder / "model")
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text(f"the {name} of a recipe, again and again\n" * 60)
    (folder / "own.yaml").write_text(
        "model: ./model\npatch: {method: yarn, factor: 2}\n"
        "data: {source: ./train.txt, sequence_length: 128}\n"
        "training: {max_steps: 2, report_to: none}\n"
        "evaluation: {source: ./test.txt, lengths: [1x, 2x]}\n"
    )


def test_without_a_recipe_it_lists_them(tmp_path, command):
    done = command("finetune", cwd=tmp_path)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()]
    assert listed == recipe_names()


def test_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, command):
    own_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = command("finetune", "own.yaml", "--dry-run", "training.max_steps=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "reads 64 tokens, is to read 128" in done.stdout and "7, 7,168 tokens" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_shows_before_and_after(tmp_path):
    own_recipe(tmp_path)
    done = run("own.yaml", "training.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout and "(1x,2x]" in done.stdout and " tokens in " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("{")) <= 80  # the Trainer's own
    rows = [json.loads(line) for line in (tmp_path / "runs" / "own" / "rows.jsonl").read_text().splitlines()]
    assert {row["recipe"] for row in rows} == {"own"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo_yran"], "Unknown recipe 'demo_yran'. Did you mean 'demo_yarn'?"),
        (["demo_yarn", "training.max_stepz=1"], "Did you mean `max_steps`?"),
        (["demo_yarn", "model=./missing", "--dry-run"], "There is no model folder './missing'"),
        (["demo_yarn", "--output-dir", "."], "exists and is not empty"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, command):
    (tmp_path / "something").write_text("else")
    done = command("finetune", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_reports_need_runs_of_the_same_documents(tmp_path):
    command = [sys.executable, "-m", "rope_scaling.recipes.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "No finished run in" in done.stderr
