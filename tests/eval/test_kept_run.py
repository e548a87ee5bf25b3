"""A run that an earlier commit wrote is read, and its scores are found again.

`golden/evaluation_run` holds what `evaluate` wrote at d8f631e, with `table.md` as it was printed then. Versions and
hashes of weights, tokenizer and methods are of the libraries of that day, so they are given as they were recorded:
where scores lie, by what they are named, and which rows follow from them has to be the same.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_model

from rope_scaling.eval import run, store
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.methods import UNPATCHED
from rope_scaling.eval.report.reading import read_run
from rope_scaling.eval.report.tables import markdown_tables
from rope_scaling.eval.suites import make_task
from rope_scaling.eval.tasks import Source, key_tokens, prepare, work
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.hf.patch import patch_record


GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation_run"
ROWS = read_rows(GOLDEN / "rows.jsonl")
CONFIG = EvaluationConfig(
    model="tiny",
    data="sentences",
    lengths=[128, 256],
    trained_length=128,
    factor=2.0,
    dtype="float32",
    device="cpu",
    chunk_size=256,
)
TASKS = {
    "perplexity": {},
    "context_gain": {"num_targets": 16},
    "key_tokens": {"gain": -100.0, "loss": 100.0, "short_context": 32, "evaluator_method": "unpatched"},
    "kv_retrieval": {"trials": 1, "num_keys": 2},
}


def texts():
    for start in (0, 1000):
        numbers = range(start, start + 200)
        yield f"text {start}", " ".join(f"Sentence {number} is about {number * number}." for number in numbers)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the run, where everything that comes from other libraries is as it was recorded."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    recorded = {row["method"]: row for row in ROWS}[UNPATCHED]
    methods = {row["method"]: row["method_sha256"] for row in ROWS}
    values = {
        "environment": lambda: recorded["versions"],
        "weights_sha256": lambda model: recorded["weights_sha256"],
        "tokenizer_sha256": lambda tokenizer: recorded["tokenizer_sha256"],
        "method_sha256": lambda model, length: methods["yarn" if patch_record(model) else UNPATCHED],
    }
    for module in (run, store, key_tokens, work):
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])
    return tmp_path / "run"


def test_scores_are_found_again_and_give_the_same_rows(folder, monkeypatch):
    model = make_model("llama", vocab_size=4096, max_position_embeddings=128)
    monkeypatch.setattr(type(model), "forward", None)  # nothing is measured
    source = Source(texts, load_tokenizer("demo"), folder=folder)
    items = prepare([make_task(*task) for task in TASKS.items()], source, CONFIG, model)
    rows, measured = run.evaluate(model, items, [], CONFIG, folder)
    assert [one.found for one in measured] == [8, 8, 8]
    for row, old in zip(json.loads(json.dumps(rows)), ROWS, strict=True):
        assert row.keys() == old.keys()
        for field in row.keys() - {"frequencies_sha256"}:
            assert row[field] == (pytest.approx(old[field]) if isinstance(old[field], float) else old[field]), field
    assert json.loads((folder / "settings.json").read_text()) == json.loads((GOLDEN / "settings.json").read_text())


def test_a_report_of_it_says_what_it_said():
    finished = read_run(GOLDEN)
    assert markdown_tables(finished.rows) == (GOLDEN / "table.md").read_text()
    assert [plot.name for plot in finished.plots()] == ["curves", "context_gain", "kv_retrieval"]
    assert all(len(curves) == 2 for curves in finished.scores["perplexity"].values())
    assert finished.cost_table() is not None
