"""The page, the tables beside it, and conditions on them."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import TRAINED_LENGTH, make_model, token_ids
from rich.console import Console

from rope_scaling import RopeScalingError
from rope_scaling.cli.main import main
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.methods import default_methods, parse_method
from rope_scaling.eval.report.distance_maps import map_figure
from rope_scaling.eval.report.html_page import write_report
from rope_scaling.eval.report.joining import read_runs
from rope_scaling.eval.report.published import published_rows, published_tables
from rope_scaling.eval.report.reading import read_run
from rope_scaling.eval.report.summary import failures
from rope_scaling.eval.report.tables import conditions, print_tables, tables
from rope_scaling.eval.run import evaluate
from rope_scaling.eval.suites import make_task
from rope_scaling.eval.tasks import Source, Work, prepare
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts


LENGTHS = [256, 512]
CONFIG = EvaluationConfig(
    model="tiny",
    data="random",
    lengths=LENGTHS,
    trained_length=256,
    factor=2.0,
    dtype="float32",
    device="cpu",
    chunk_size=256,
)
METHODS = [parse_method("angle_clip"), parse_method("self_extend")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a tiny random model with every kind of table."""
    out = tmp_path_factory.mktemp("report") / "run"
    model = make_model("llama", vocab_size=4096, max_position_embeddings=256)
    source = Source(lambda: read_texts("python-reference"), load_tokenizer("demo"), pieces=True, max_documents=4)
    settings = {
        "perplexity": {},
        "repeats": {"ngram": 2},
        "context_gain": {"num_targets": 32},
        "kv_retrieval": {"trials": 3},
        "niah_multikey": {"trials": 2, "depths": 3},
        "yarn_stride": {"stride": 128},
    }
    work = prepare([make_task(*item) for item in settings.items()], source, CONFIG, model)
    evaluate(model, work, METHODS, CONFIG, out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    write_report(read_runs([folder]), folder)
    return (folder / "report.html").read_text()


def test_the_page_holds_everything_and_needs_no_network(page):
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page and "@import" not in page
    assert page.count("data:image/png;base64,") == 7, "curves, gain, two tasks, a grid of depths, two maps"
    order = [page.index(word) for word in ("Summary", "<img", "Perplexity by position", "in miniature", "Provenance")]
    assert order == sorted(order)
    words = "unpatched, cropping, yarn, angle_clip, torch, usable length, Far repeats, Cost of what was measured"
    for word in words.split(", "):
        assert word in page


def test_every_table_has_the_baselines_and_the_intervals(folder):
    for table in tables(read_rows(folder / "rows.jsonl")):
        names = [line[0] for line in table.lines[1:]]
        own = {"unpatched", "cropping", "yarn"} - {word for word in ("unpatched", "cropping") if word in table.title}
        assert own <= set(names), table.title
        if "ifference" in table.title or "right, " in table.title:
            assert all("[" in cell for line in table.lines[1:] for cell in line[1:]), table


def test_markdown_csv_and_pictures_lie_beside_it(folder, page):
    rows = read_rows(folder / "rows.jsonl")
    with (folder / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert float(lines[0]["nll"]) == rows[0]["nll"] and json.loads(lines[0]["lengths"]) == LENGTHS
    assert "| angle_clip |" in (folder / "report.md").read_text()
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"curves.png", "kv_retrieval.png", "niah_multikey_depths.png", "map-self_extend.png"} <= pictures


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, a browser without a window")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_scrolling_sideways(folder, page, tmp_path, width):
    probe = "<script>document.title = [document.documentElement.scrollWidth <= window.innerWidth, "
    probe += "[...document.images].every(one => one.complete && one.naturalWidth > 100)]</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, tmp_path / "page.html"], capture_output=True, text=True, check=False).stdout
    assert re.search("<title>(.*)</title>", shown)[1] == "true,true"


def test_tables_fit_a_narrow_terminal(folder, capsys):
    print_tables(read_rows(folder / "rows.jsonl"), Console(width=80))
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    assert out.count("unpatched") > 8


# Conditions ---------------------------------------------------------------------------------------------------------


def test_conditions_compare_what_the_summary_shows(folder):
    rows = [dict(row) for row in read_rows(folder / "rows.jsonl")]
    for row in rows:
        if row["measure"] == "usable_length":
            row["usable_length"] = {"angle_clip": 512}.get(row["method"], 256)
        if row["measure"] == "length" and row["method"] == "yarn":
            row["accuracy"] = 0.25
    found = failures(rows, "usable_length < 2x")
    assert found == [
        "yarn: usable_length is 256, which is < 2x",
        "self_extend: usable_length is 256, which is < 2x",
    ]
    assert failures(rows, "angle_clip: usable_length < 2x") == []
    assert failures(rows, "unpatched: usable_length <= 256") == ["unpatched: usable_length is 256, which is <= 256"]
    assert failures(rows, "yarn: kv_retrieval.accuracy >= 0.25") and not failures(
        rows, "yarn: kv_retrieval.accuracy > 0.25"
    )
    for condition, message in (
        ("usable_length", "A condition is `NAME < VALUE`"),
        ("usable < 2x", "Unknown number of 'yarn': 'usable'. Did you mean 'usable_length'"),
        ("yarm: tax > 1", "Unknown method of this report 'yarm'. Did you mean 'yarn'"),
        ("tax < much", "a number or a length such as `4x`; got 'much'"),
    ):
        with pytest.raises(RopeScalingError, match=re.escape(message)):
            failures(rows, condition)


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return stopped.value.code


def test_the_command_exits_with_1_if_a_condition_is_met(folder, tmp_path, capsys):
    assert command("report", folder, "--output", tmp_path, "--fail-if", "tax > 100", "--fail-if", "repeats > 9") == 0
    assert (
        command("report", folder, "--output", tmp_path, "--fail-if", "yarn: tax > -100", "--fail-if", "tax > 9") == 1
    )
    out = capsys.readouterr().out
    assert out.count("Failed: ") == 1 and "Failed: yarn: tax is" in out and "which is > -100" in out


# Several runs -------------------------------------------------------------------------------------------------------


def edited(folder, target, **changes):
    """A copy of a run whose rows say something else."""
    shutil.copytree(folder, target)
    rows = [json.dumps(row | changes) for row in read_rows(folder / "rows.jsonl")]
    (target / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return target


def test_runs_of_one_model_and_text_stand_in_one_table(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rows = [row for row in read_rows(folder / "rows.jsonl") if row["method"] in ("unpatched", "cropping", "yarn")]
    own = [row | {"method": "yarn again"} for row in rows if row["method"] == "yarn"]
    (other / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, *own])) + "\n")
    (run,) = read_runs([folder, other])
    assert list(dict.fromkeys(row["method"] for row in run.rows))[-1] == "yarn again"
    assert len(run.rows) == len(read_rows(folder / "rows.jsonl")) + len(own)


def test_runs_of_machines_that_round_otherwise_stand_in_one_table(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    rows = read_rows(folder / "rows.jsonl")
    (other / "rows.jsonl").write_text(
        "\n".join(json.dumps(row | ({"nll": row["nll"] + 0.004} if "nll" in row else {})) for row in rows) + "\n"
    )
    (run,) = read_runs([folder, other])
    assert run.rows == rows


def test_rows_that_do_not_belong_together_are_refused(folder, tmp_path):
    model = edited(folder, tmp_path / "model", model="another")
    with pytest.raises(RopeScalingError, match=r"they differ in model \(tiny and another\). Give `--mixed`"):
        read_runs([folder, model])
    assert [run.title for run in read_runs([folder, model], mixed=True)] == ["tiny, factor 2", "another, factor 2"]
    texts = edited(folder, tmp_path / "texts", documents_sha256="0" * 16)
    with pytest.raises(RopeScalingError, match="the texts of perplexity"):
        read_runs([folder, texts])
    numbers = edited(folder, tmp_path / "numbers", nll=1.0)
    with pytest.raises(RopeScalingError, match="'unpatched' in 'perplexity' different numbers on the same texts"):
        read_runs([folder, numbers])


def written(folder, rows):
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_two_metrics_of_a_task_are_two_measurements(folder, tmp_path):
    one = next(row for row in read_rows(folder / "rows.jsonl") if row["measure"] == "length")
    one |= {
        "measure": "harness",
        "task": "arc_easy",
        "harness": "lm-eval 0.4.9",
        "score_low": None,
        "score_high": None,
    }
    rows = [one | {"metric": metric, "score": score} for metric, score in (("acc", 0.25), ("acc_norm", 0.75))]
    more = [row | {"method": "rerope", "in_effect": "rerope"} for row in rows]
    (run,) = read_runs([written(tmp_path / "one", rows), written(tmp_path / "other", rows + more)])
    assert run.rows == rows + more
    lines = {table.title.split(" (")[0]: table.lines[1:] for table in tables(run.rows)}
    assert [line[1] for line in lines["arc_easy, acc"]] == ["0.250"] * 2
    assert [line[1] for line in lines["arc_easy, acc_norm"]] == ["0.750"] * 2
    different = [row | {"score": 1.0} for row in rows]
    with pytest.raises(RopeScalingError, match="different numbers on the same texts"):
        read_runs([tmp_path / "one", written(tmp_path / "different", different)])


def test_a_table_of_several_library_versions_says_which_row_has_which(folder, tmp_path):
    rows = read_rows(folder / "rows.jsonl")
    own = [row for row in rows if row["method"] != "self_extend"]
    others = [
        row | {"versions": row["versions"] | {"torch": "1.2.3"}, "chunk_size": 17}
        for row in rows
        if row["method"] == "self_extend"
    ]
    (run,) = read_runs([written(tmp_path / "one", own), written(tmp_path / "other", others)])
    torch = rows[0]["versions"]["torch"]
    said = f"torch {torch} (unpatched, cropping, yarn, angle_clip) and 1.2.3 (self_extend)"
    assert said in conditions(run.rows) and "of 256 (unpatched, cropping" in conditions(run.rows)
    write_report([run], tmp_path / "report")
    assert said in (tmp_path / "report" / "report.html").read_text()
    assert said in (tmp_path / "report" / "report.md").read_text()
    assert f"torch {torch}," in f"{conditions(rows)}, "


def test_runs_that_call_two_methods_alike_make_no_common_table(folder, tmp_path):
    rows = read_rows(folder / "rows.jsonl")
    one = [row for row in rows if row["task"] == "perplexity"]
    for name, value in (("in_effect", "self_extend:group_size=16"), ("method_sha256", "0" * 16)):
        other = [
            row | ({name: value} if row["method"] == "self_extend" else {}) for row in rows if row["task"] == "repeats"
        ]
        folders = [written(tmp_path / f"{name}-{index}", some) for index, some in enumerate((one, other))]
        with pytest.raises(RopeScalingError, match="call different methods 'self_extend'. Report them apart"):
            read_runs(folders)


def test_runs_of_other_weights_make_no_common_table(folder, tmp_path):
    trained = edited(folder, tmp_path / "trained", weights_sha256="0" * 16)
    with pytest.raises(RopeScalingError, match=r"they differ in weights_sha256 \("):
        read_runs([folder, trained])


def test_costs_of_a_method_are_added_up(folder):
    costs = [{"method": "yarn", "task": "copy", "tokens": 1000, "seconds": 0.5, "processes": 1}] * 3
    table = dataclasses.replace(read_run(folder), costs=costs).cost_table()
    assert table.lines[1:] == [["yarn", "copy", "3,000", "1.5", "2,000"]]


def test_rows_of_an_earlier_format_are_read(folder, tmp_path):
    """Rows name no scores then, and lack hashes of weights and methods."""
    rows = [
        {key: value for key, value in row.items() if not key.endswith(("weights_sha256", "method_sha256", "scores"))}
        for row in read_rows(folder / "rows.jsonl")
    ]
    (run,) = read_runs([written(tmp_path / "old", rows), folder])
    assert run.rows == rows and set(run.scores["perplexity"]) == {
        "unpatched",
        "cropping",
        "yarn",
        "angle_clip",
        "self_extend",
    }


def test_two_models_make_two_sections(folder, tmp_path):
    write_report(read_runs([folder, edited(folder, tmp_path / "m", model="<b>another</b>")], mixed=True), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<h2>") == 2 and "&lt;b&gt;another" in page, "what rows say is text, not markup"
    assert (tmp_path / "1-curves.png").exists() and (tmp_path / "2-curves.png").exists()


def test_folders_that_hold_no_run(folder, tmp_path):
    with pytest.raises(RopeScalingError, match="holds no finished run: no `rows.jsonl` there"):
        read_run(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{")
    with pytest.raises(RopeScalingError, match="not made of JSON lines"):
        read_run(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"task": "finetune", "method": "x", "measure": "bucket"}\n')
    with pytest.raises(RopeScalingError, match="not those of `rope-scaling evaluate`"):
        read_run(tmp_path)


def test_published_numbers_stand_beside_ours_where_model_and_protocol_match(folder, tmp_path):
    rows = published_rows()
    assert len(rows) > 30 and all(", https://huggingface.co/papers/" in row["source"] for row in rows)
    assert not published_tables(read_run(folder).rows)
    one = next(row for row in rows if row["protocol"] == "yarn_stride")
    matching = read_run(edited(folder, tmp_path / "same", model=f"org/{one['models'][0]}"))
    shown = published_tables(matching.rows)
    assert shown and all("Published, not measured here: yarn_stride" in table.title for table in shown)
    assert any(one["method"] == line[0] for table in shown for line in table.lines)
    assert not published_tables(read_run(edited(folder, tmp_path / "other", model="org/none")).rows)


# Rows ---------------------------------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_are_reported_and_not_averaged(tmp_path):
    model = make_model("llama")
    documents = [Document("odd", token_ids(2 * TRAINED_LENGTH)[0])]
    config = dataclasses.replace(CONFIG, lengths=[TRAINED_LENGTH, 2 * TRAINED_LENGTH], trained_length=TRAINED_LENGTH)
    with np.errstate(all="ignore"):
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(RopeScalingError, match="'unpatched' gives losses that are not finite on 'odd'"):
            evaluate(model, [Work(make_task("perplexity", {}), documents)], [], config, tmp_path / "run")
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_tasks_and_methods_can_be_added_to_a_run(folder, tmp_path):
    out = tmp_path / "run"
    model = make_model("llama", vocab_size=4096, max_position_embeddings=256)
    source = Source(lambda: read_texts("python-reference"), load_tokenizer("demo"), max_documents=2)
    scored = []
    for names, methods in ((["copy"], []), (["copy", "kv_retrieval"], []), (["copy"], METHODS[:1])):
        work = prepare([make_task(name, {"trials": 2}) for name in names], source, CONFIG, model)
        evaluate(model, work, methods, CONFIG, out)
        scored.append(sum(row["tokens"] for row in read_rows(out / "costs.jsonl")))
    rows = read_rows(out / "rows.jsonl")
    assert {(row["task"], row["method"]) for row in rows} >= {("kv_retrieval", "yarn"), ("copy", "angle_clip")}
    assert len({(r["task"], r["method"], r["measure"], r["to"]) for r in rows}) == len(rows)
    assert scored[0] < scored[1] < scored[2], "what was scored is not scored again"


def test_every_method_that_a_run_names_by_itself_has_a_map_or_none():
    specs = {spec.label: map_figure(spec.label, spec.arguments, 256, 1024) for spec in default_methods("demo", 8.0)}
    drawn = {label for label, figure in specs.items() if figure is not None}
    assert {"self_extend:group_size=16", "angle_clip", "streaming", "dynamic_yarn"} <= drawn
    assert not {"yarn", "dynamic_longrope"} & drawn  # no distances; numbers for every pair
