"""The README's code blocks run, its numbers come from committed rows, and what it lists exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rope_scaling import METHODS
from rope_scaling.cli.main import app
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.report.tables import markdown_tables
from rope_scaling.eval.tasks import TASKS
from rope_scaling.recipes.config import recipe_names
from rope_scaling.recipes.report import tables


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SPANS = (ROOT / "docs" / "spans.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()
ECOSYSTEM = (ROOT / "docs" / "ecosystem.md").read_text()
LINEAR = (ROOT / "docs" / "linear-attention.md").read_text()
RECIPES = (ROOT / "recipes" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
GUIDES = re.findall(r"```(\w+)\n(.*?)```", EVALUATION + ECOSYSTEM, flags=re.DOTALL)
DEMO = repr(str(ROOT / "rope_scaling" / "demo" / "model"))


LOAD = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained({DEMO}) for kind in (AutoModelForCausalLM, AutoTokenizer))
"""


def python_in(text):
    """The Python blocks of a page, as one program, with the embedded model in place of the one on the hub."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert program
    return program.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', DEMO)


def runs(program, folder):
    """Runs a program in an empty folder."""
    environment = os.environ | {"HF_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_python_blocks_run_in_order(tmp_path):
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in README
    runs(python_in(README), tmp_path)


def test_the_guide_to_evaluation_runs_too(tmp_path):
    runs(python_in(EVALUATION), tmp_path)
    for name, task in TASKS.items():
        assert f"| `{name}` | {task.about} |" in EVALUATION


def test_the_guide_to_spans_runs_too(tmp_path):
    runs(LOAD + python_in(SPANS), tmp_path)


def test_linear_attention_agrees_with_its_quadratic_form(tmp_path):
    runs(python_in(LINEAR), tmp_path)


def test_the_guide_to_what_stands_beside_runs_too(tmp_path):
    pytest.importorskip("trl")
    program = python_in(ECOSYSTEM).replace("packing=True", "packing=True, use_cpu=True, report_to=[], max_steps=1")
    runs(program + "trainer.train()\n", tmp_path)


def test_the_guide_to_recipes_runs_too(tmp_path):
    runs(LOAD + python_in(RECIPES), tmp_path)
    names = set(re.findall(r"`(\w+)`", RECIPES.split("| recipe |")[1].split("*Published*")[0]))
    assert set(recipe_names()) <= names


@pytest.mark.parametrize(
    "command",
    [
        command
        for _, code in [block for block in BLOCKS + GUIDES if block[0] == "bash"]
        for command in code.splitlines()
        if command.startswith("rope-scaling")
    ],
)
def test_shell_commands_are_understood(command):
    """Every option that the README shows is one that the command has."""
    words = iter(command.split("#")[0].split()[1:])
    found = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found = found.commands[next(words)]
    options = {name for parameter in found.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


def tables_in(text):
    """Tables as lists of lines, without the rule below the header."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = block.splitlines()
        yield [lines[0], *lines[2:]]


def test_tables_are_those_of_the_committed_rows():
    """Every line made from rows is committed as it is; a table of such lines, wherever it is shown, has no others."""
    made, headers = set(), set()
    for folder in sorted((ROOT / "docs" / "results").iterdir()):
        if folder.is_dir():
            rows = read_rows(folder / "rows.jsonl")
            text = tables(rows) if rows[0]["task"] == "finetune" else markdown_tables(rows)
            beside = folder / "table.md"
            shown = RESULTS + (beside.read_text() if beside.exists() else "")
            for header, *lines in tables_in(text):
                assert not [line for line in (header, *lines) if line not in shown], folder
                made.update(lines)
                headers.add(header)
    shown = [table for text in (README, RESULTS) for table in tables_in(text) if table[0] in headers]
    assert len(shown) > 12 and not [line for _, *lines in shown for line in lines if line not in made]


def test_benchmark_numbers_are_those_of_the_committed_rows():
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            for ratio in ("ratio", "tokens_per_second_ratio", "log_probability"):
                if ratio in row:
                    digits = 2 if ratio == "log_probability" else 3
                    assert f"{row[ratio]:.{digits}f}" in README + RESULTS + EVALUATION, row


def test_counts_of_families_are_those_of_the_table():
    table = (ROOT / "docs" / "families.md").read_text()
    families, frequencies, distances, windows = re.search(
        r"Of (\d+) causal .*: frequencies on (\d+), distances on (\d+), windows on (\d+)", table
    ).groups()
    assert distances == windows
    assert f"Of {families} families that rotate queries and keys" in " ".join(README.split())
    assert f"frequencies can be changed on {frequencies}, attention on {distances};" in " ".join(README.split())


def test_every_method_has_a_line_with_its_paper():
    for name, cls in METHODS.items():
        (line,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
        assert cls.paper in line
        assert f"| {cls.needs_training} |" in line
        assert cls.changes in line


def test_linked_files_exist():
    pages = (
        (ROOT, README),
        (ROOT / "docs", RESULTS),
        (ROOT / "docs", SPANS),
        (ROOT / "docs", EVALUATION),
        (ROOT / "docs", ECOSYSTEM),
        (ROOT / "recipes", RECIPES),
    )
    for folder, text in pages:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert (folder / target).exists(), target


def test_length():
    lines = README.count("\n")
    assert lines < 250, f"README.md has {lines} lines and may have 249: join or shorten others where you add one."
