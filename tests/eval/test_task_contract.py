"""What every task has to do, whatever it measures: a new one adds a line to `task_cases.CASES`."""

import dataclasses
import json
import math

import pytest
from conftest import make_model
from planted import Knower

from rope_scaling.eval.figures import png
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.report.reading import read_run
from rope_scaling.eval.report.summary import failures, summary_numbers
from rope_scaling.eval.report.task_rows import task_class
from rope_scaling.eval.run import evaluate
from rope_scaling.eval.suites import make_task
from rope_scaling.eval.tasks import TASKS, Scores, Source, prepare
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts
from task_cases import CASES, CONFIG


TOKENIZER = load_tokenizer("demo")
ANSWERED = [name for name, case in CASES.items() if case.knows is not None]


def make_source(**changes):
    arguments = {"pieces": True, "max_documents": 2} | changes
    return Source(lambda: read_texts("python-reference"), TOKENIZER, **arguments)


def tiny():
    return make_model("llama", vocab_size=4096, max_position_embeddings=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks") / "run"


@pytest.fixture(scope="module")
def work(folder):
    tasks = [make_task(name, case.settings) for name, case in CASES.items()]
    return prepare(tasks, make_source(folder=folder), CONFIG, tiny())


@pytest.fixture(scope="module")
def rows(folder, work):
    """Rows of a tiny random model by all tasks."""
    evaluate(tiny(), work, [], CONFIG, folder)
    return read_rows(folder / "rows.jsonl")


def of(name, rows):
    return [row for row in rows if row["task"] == name]


def test_every_task_has_a_case():
    assert list(CASES) == list(TASKS)
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("name", CASES)
def test_items_are_the_same_every_time(name, work):
    (first,) = [part for part in work if part.task.name == name]
    again, _ = make_task(name, CASES[name].settings).items(make_source(), CONFIG, tiny())
    assert [item.sha256 for item in again] == [item.sha256 for item in first.items]
    assert len({item.sha256 for item in again}) == len(again) and all(item.cost > 0 for item in again)
    assert len({item.name for item in again}) == len(again)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_method_measure_the_same(name, rows):
    keys = {}
    for row in of(name, rows):
        key = [row.get(field) for field in ("measure", "from", "to", "depth")]
        keys.setdefault(row["method"], []).append(tuple(key))
    assert list(keys) == [UNPATCHED, CROPPING, "yarn"]
    assert keys[UNPATCHED] == keys[CROPPING] == keys["yarn"] and len(set(keys["yarn"])) == len(keys["yarn"])
    assert all(row["difference"] == 0 for row in of(name, rows) if row["method"] == UNPATCHED and "difference" in row)
    json.dumps(of(name, rows), allow_nan=False)


@pytest.mark.parametrize("name", CASES)
def test_a_report_finds_the_task_of_its_rows_and_shows_every_method(name, rows):
    own = of(name, rows)
    assert task_class(own) is TASKS[name]
    tables = TASKS[name].tables(own)
    assert tables and len({table.title for table in tables}) == len(tables)
    for table in tables:
        left_out = [line for line in (UNPATCHED, CROPPING) if f"ifference to {line}" in table.title]
        if not (left_out and name == "context_gain"):
            assert [line[0] for line in table.lines[1:]] == [
                method for method in (UNPATCHED, CROPPING, "yarn") if method not in left_out
            ]
        assert all(len(line) == len(table.lines[0]) and all(line) for line in table.lines), table.title


@pytest.mark.parametrize("name", CASES)
def test_figures_are_drawn_from_what_is_on_disk(name, rows, folder):
    scores = read_run(folder).scores.get(name, {})
    assert bool(scores) == TASKS[name].draws_scores
    pictures = list(TASKS[name].pictures(of(name, rows), scores))
    assert len({picture.name for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert png(picture.figure).startswith(b"\x89PNG") and picture.alt
        legend = picture.figure.axes[0].get_legend()
        shown = {text.get_text() for text in legend.get_texts()} if legend else {UNPATCHED, CROPPING, "yarn"}
        assert {UNPATCHED, CROPPING, "yarn"} <= shown


@pytest.mark.parametrize("name", CASES)
def test_conditions_may_name_the_numbers_of_the_summary(name, rows):
    own = of(name, rows)
    numbers = summary_numbers(own)
    assert numbers["yarn"].keys() == numbers[UNPATCHED].keys()
    assert (f"{name}.accuracy" in numbers["yarn"]) == (name in ANSWERED)
    for number, value in numbers["yarn"].items():
        assert failures(own, f"yarn: {number} <= {value!r}") and not failures(own, f"yarn: {number} > {value!r}")


def test_all_scores_are_found_again(rows, folder, work):
    again, measured = evaluate(tiny(), work, [], CONFIG, folder)
    assert json.loads(json.dumps(again)) == rows
    assert sum(one.found for one in measured) == 3 * sum(len(part.items) for part in work)


def planted_rows(name, reach):
    """Rows of a model that knows the answers up to `reach` tokens."""
    task = make_task(name, CASES[name].settings)
    items, _ = task.items(make_source(), CONFIG, None)
    model = Knower(TOKENIZER, items, reach)
    own = [task.score(model, item, CONFIG) for item in items]
    cropped = [task.score_cropped(model, item, plain, CONFIG) for item, plain in zip(items, own, strict=True)]
    return task.rows(items, Scores(own, own, cropped), CONFIG)


def accuracies(name, reach):
    measure = TASKS[name].recognised_by
    return {row["to"]: row["accuracy"] for row in planted_rows(name, reach) if row["measure"] == measure}


@pytest.mark.parametrize("name", ANSWERED)
def test_a_model_that_knows_the_answers_scores_1(name):
    assert accuracies(name, math.inf) == {256: CASES[name].knows, 512: CASES[name].knows}
    assert all(row["nll"] < 1e-3 for row in planted_rows(name, math.inf))


@pytest.mark.parametrize("name", ANSWERED)
def test_a_model_that_knows_nothing_scores_by_chance(name):
    assert accuracies(name, 0) == {256: CASES[name].guesses, 512: CASES[name].guesses}
    assert all(row["nll"] == pytest.approx(math.log(len(TOKENIZER))) for row in planted_rows(name, 0))


@pytest.mark.parametrize("name", ANSWERED)
def test_a_model_that_is_right_only_below_1x_shows_that(name):
    assert accuracies(name, 256) == {256: CASES[name].knows, 512: CASES[name].guesses}


def test_the_same_task_at_another_seed_asks_for_something_else():
    config = dataclasses.replace(CONFIG, seed=1)
    for name in ANSWERED:
        task = make_task(name, CASES[name].settings)
        first, second = (task.items(make_source(), one, None)[0] for one in (CONFIG, config))
        assert not {item.sha256 for item in first} & {item.sha256 for item in second}, name
