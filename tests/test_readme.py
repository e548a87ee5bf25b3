"""The README's code blocks run, its numbers come from committed rows, and what it lists exists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rope_scaling.eval.report import markdown_tables
from rope_scaling.eval.rows import read_rows
from rope_scaling.frequencies import METHODS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(tmp_path):
    """As one program, from an empty folder, with the embedded model in the place of the one on the hub."""
    program = "\n".join(code for language, code in BLOCKS if language == "python")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in program
    replaced = program.replace(
        '"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(ROOT / "rope_scaling" / "demo" / "model"))
    )
    done = subprocess.run([sys.executable, "-c", replaced], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [c for lang, code in BLOCKS if lang == "bash" for c in code.splitlines() if c.startswith("rope-scaling")],
)
def test_shell_commands_are_understood(command, tmp_path):
    """Every option that the README shows is one that the command has."""
    words = command.split("#")[0].split()
    command = [sys.executable, "-m", "rope_scaling.cli.main", words[1], "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    help_text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for word in words[2:]:
        if word.startswith("--"):
            assert word in help_text


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make (\w+)", README)) <= targets


def test_tables_are_those_of_the_committed_rows():
    """Every line of the tables made from rows stands in the README to the letter."""
    for folder in ("demo", "smollm2-135m"):
        for line in markdown_tables(read_rows(ROOT / "docs" / "results" / folder / "rows.jsonl")).splitlines():
            if line.startswith("|") and "---" not in line:
                assert line in README, f"{folder}: {line}"


def test_benchmark_numbers_are_those_of_the_committed_rows():
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            if "ratio" in row:
                assert f"{row['ratio']:.3f}" in README, row


def test_every_method_has_a_line_with_its_paper():
    for name, cls in METHODS.items():
        (line,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
        assert cls.paper in line
        assert f"| {cls.needs_training} |" in line


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_length():
    assert README.count("\n") < 250
