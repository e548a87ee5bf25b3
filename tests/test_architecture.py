"""The ways that docs/architecture.md tells are true: every file is there, and defines what it is said to do."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()
WAYS = re.findall(r"^### The way of (.+?)\n(.*?)(?=^### |^\*\*Evaluation)", TEXT, re.MULTILINE | re.DOTALL)
FILES = {*re.findall(r"`((?:[a-z_]+/)+\w+\.py)`", TEXT)}


def defined(file):
    """Names of functions, methods and classes."""
    tree = ast.parse(next(path for path in (ROOT / file, ROOT / "rope_scaling" / file) if path.exists()).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize(("name", "text"), WAYS)
def test_a_way_is_told_in_at_most_eight_steps_by_file_and_function(name, text):
    steps = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert 1 < len(steps) <= 8
    for step in steps:
        places = re.findall(r"`([\w/]+\.py): (\w+)`", " ".join(step.split()))
        assert places, step
        for file, function in places:
            assert function in defined(file), f"{file} defines no {function}"


def test_all_ways_are_told():
    assert [name for name, _ in WAYS] == [
        "a method to the rotary buffer",
        "a span to a score",
        "a document to a row and a figure",
        "a recipe to a checkpoint",
    ]


@pytest.mark.parametrize("file", sorted(FILES))
def test_every_file_that_is_named_is_there(file):
    assert (ROOT / file).exists() or (ROOT / "rope_scaling" / file).exists()
