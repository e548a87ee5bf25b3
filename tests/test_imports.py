"""Who may import whom, and what `import rope_scaling` costs."""

import ast
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ROOMS = {
    "rope_scaling": ROOT / "rope_scaling",
    "rope_scaling.recipes": ROOT / "recipes",
    "rope_scaling.eval": ROOT / "eval",
}

# An arrow of docs/architecture.md: what a room may import from within the project, beside itself.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "geometry": {"errors"},
    "lengths": {"errors"},
    "notation": {"errors", "lengths"},
    "frequencies": {"errors", "geometry", "notation"},
    "devices": set(),
    "spans": {"devices", "errors", "frequencies", "geometry", "notation"},
    "temperatures": {"errors", "notation"},
    "registry": {"errors", "frequencies", "notation", "spans", "temperatures"},
    "methods": {"errors", "lengths", "notation", "registry"},
    "relative": {"errors", "geometry", "methods", "spans"},
    "attention": {"devices", "errors", "spans"},
    "training": {"errors"},
    "strict": {"errors"},
    "texts": {"demo", "errors"},
    "hf": {
        *(
            "attention",
            "errors",
            "frequencies",
            "geometry",
            "methods",
            "notation",
            "spans",
            "temperatures",
            "training",
        ),
    },
    "exporters": {"errors", "frequencies", "geometry", "hf", "methods"},
    "doctor": {"errors", "exporters", "hf"},
    "demo": {"errors", "hf"},
    "recipes": {
        *("__init__", "errors", "demo", "eval", "frequencies", "geometry", "hf", "lengths", "methods", "strict"),
        *("texts", "training", "version"),
    },
    "eval": {
        *("errors", "demo", "frequencies", "geometry", "hf", "lengths", "methods", "notation", "relative", "spans"),
        *("strict", "temperatures", "version"),
    },
    "cli": {
        *("doctor", "errors", "eval", "exporters", "frequencies", "geometry", "hf", "lengths", "methods", "recipes"),
        *("relative", "texts", "version"),
    },
    "__main__": {"cli"},
    "__init__": {
        *("doctor", "errors", "exporters", "frequencies", "geometry", "hf", "methods", "relative", "spans"),
        *("temperatures", "version"),
    },
}
HEAVY = {
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "rich",
    "typer",
    "evaluate",
    "tokenizers",
    "numpy",
}
LIGHT_ROOMS = {
    *("errors", "version", "geometry", "frequencies", "spans", "temperatures", "methods", "relative", "attention"),
    *("lengths", "notation", "registry", "__init__"),
}
HOST_ROOMS = {"hf", "doctor", "exporters", "recipes", "eval", "cli"}


def sources():
    for name, folder in ROOMS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield file, name.removeprefix("rope_scaling").lstrip(".") or parts[0]


def imports(file):
    """Every module a file imports, and whether it does so as it is loaded."""
    tree = ast.parse(file.read_text())
    typed = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    inside = {node for block in ast.walk(tree) if isinstance(block, ast.FunctionDef) for node in ast.walk(block)}
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            yield name, node not in typed and node not in inside


@pytest.mark.parametrize(
    ("file", "room"),
    list(sources()),
    ids=lambda value: value.relative_to(ROOT).as_posix() if isinstance(value, Path) else "",
)
def test_direction(file, room):
    for name, at_load in imports(file):
        top, _, rest = name.partition(".")
        if top == "rope_scaling":
            target = rest.partition(".")[0] or "__init__"
            assert target == room or target in ALLOWED[room], f"{room} must not import {name}"
        if top in HEAVY and room in LIGHT_ROOMS:
            pytest.fail(f"{room} must not need {name}")
        if top in ("transformers", "peft") and room not in HOST_ROOMS:
            pytest.fail(f"{room} must not import {name}")
        on_use = room != "recipes" and "metrics" not in file.parts  # `evaluate` loads what is in `metrics` by itself
        assert not (at_load and top in ("matplotlib", "datasets") and on_use), f"{name} must load on use"
        assert not name.startswith((".", "recipes", "eval.")), "absolute imports only"


EVAL_ORDER = {"base": 0, "scoring": 1, "metrics": 2, "tasks": 2, "lm_eval": 3, "report": 4, "run": 4}
"""Rooms of `eval/`: each may import from rooms of a lower number. Modules of its top level are in `base` or `run`."""


def eval_room(parts):
    if len(parts) > 1:
        return parts[0]
    return "run" if parts[0] in ("run", "store", "suites") else "base"


EVAL = ROOMS["rope_scaling.eval"]


@pytest.mark.parametrize("file", sorted(EVAL.rglob("*.py")), ids=lambda file: file.relative_to(EVAL).as_posix())
def test_direction_inside_eval(file):
    own = eval_room(file.relative_to(EVAL).with_suffix("").parts)
    for name, _ in imports(file):
        if name.startswith("rope_scaling.eval."):
            parts = name.split(".")[2:]
            is_room = (EVAL / parts[0]).is_dir()
            target = parts[0] if is_room else eval_room(parts[:1])
            assert target == own or EVAL_ORDER[target] < EVAL_ORDER[own], f"{own} must not import {name}"


def test_eval_has_no_import_circle():
    graph = {}
    for file in EVAL.rglob("*.py"):
        parts = file.relative_to(EVAL).with_suffix("").parts
        module = ".".join(["rope_scaling.eval", *parts]).removesuffix(".__init__")
        graph[module] = {name for name, at_load in imports(file) if at_load}

    def walk(module, path):
        assert module not in path, " -> ".join([*path, module])
        for target in graph.get(module, ()):
            if target in graph and target != module:
                walk(target, [*path, module])

    for module in graph:
        walk(module, [])


def test_import_loads_torch_and_nothing_heavy():
    code = f"import sys, rope_scaling; print(sorted({HEAVY - {'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_costs_at_most_a_tenth_more_than_torch():
    """Processor seconds, the two alternating; by the best of each or the middle of all pairs: what the machine does
    besides falls on both.
    """

    def cost(statement):
        code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
            ).stdout
        )

    def ratio():
        pairs = [ours / torchs for ours, torchs in zip(our_costs, torch_costs, strict=True)]
        return min(min(our_costs) / min(torch_costs), statistics.median(pairs))

    deadline, torch_costs, our_costs = time.monotonic() + 60, [], []
    while time.monotonic() < deadline:
        torch_costs.append(cost("import torch"))
        our_costs.append(cost("import rope_scaling"))
        if len(torch_costs) >= 5 and ratio() <= 1.1:
            break
    assert ratio() <= 1.1, (our_costs, torch_costs)


def test_public_names_exist():
    import rope_scaling

    assert rope_scaling.__all__ == sorted(
        rope_scaling.__all__, key=lambda name: (not name.isupper(), name.islower(), name)
    )
    assert all(getattr(rope_scaling, name) is not None for name in rope_scaling.__all__)
    assert set(rope_scaling.__all__) <= set(dir(rope_scaling))


def test_no_file_in_a_mapped_folder_shadows_a_library():
    names = {file.stem for folder in ("recipes", "eval") for file in (ROOT / folder).rglob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | HEAVY | {"torch", "yaml", "safetensors"})


def test_house_sizes():
    for file, _ in sources():
        text = file.read_text()
        assert text.count("\n") <= 400, f"{file} is longer than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{file}: {node.name} is longer than 80 lines"
