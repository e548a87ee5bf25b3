"""Rows can be trusted: paired, reproducible, resumable, and never of two runs in one folder."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TRAINED_LENGTH, make_model, token_ids

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.eval.documents import Document
from rope_scaling.eval.figures import curves_figure, png
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.methods import default_methods, parse_method
from rope_scaling.eval.report.tables import markdown_tables
from rope_scaling.eval.run import EvaluationConfig, evaluate
from rope_scaling.eval.scoring.buckets import measure, position_buckets
from rope_scaling.eval.scoring.identity import frequencies_sha256
from rope_scaling.eval.stats import estimate
from rope_scaling.eval.tasks import Work
from rope_scaling.eval.tasks import curve_task as task_module
from rope_scaling.eval.tasks.perplexity import Perplexity
from rope_scaling.hf.describe import read_description
from rope_scaling.methods import parse, patch_arguments


LENGTHS = [TRAINED_LENGTH * k for k in (1, 2, 4)]
METHODS = [parse_method("yarn"), parse_method("abf:rope_theta=1e+06")]


def make_documents(lengths=(256, 256, 200, 100)):
    documents = [Document(f"d{i}", token_ids(n, seed=i)[0]) for i, n in enumerate(lengths)]
    return [Work(Perplexity(), documents, skipped=1)]


def make_config(**changes):
    values = {"model": "tiny", "data": "random", "lengths": LENGTHS, "trained_length": TRAINED_LENGTH, "factor": 4.0}
    return EvaluationConfig(**values | {"dtype": "float32", "device": "cpu", "chunk_size": 64} | changes)


@pytest.fixture
def finished(tmp_path):
    rows, curves = evaluate(make_model("llama"), make_documents(), METHODS, make_config(), tmp_path / "run")
    return rows, curves, tmp_path / "run"


def find(rows, method, start, end, measure="bucket"):
    key = (method, measure, start, end)
    (row,) = [r for r in rows if (r["method"], r["measure"], r.get("from"), r.get("to")) == key]
    return row


def test_buckets_partition_the_positions():
    assert position_buckets([256, 512, 1024, 2048], 256) == [
        (0, 128),
        (128, 256),
        (256, 512),
        (512, 1024),
        (1024, 2048),
    ]
    assert position_buckets([100], 256) == [(0, 100)]
    assert position_buckets([8192, 16384], 8192) == [(0, 4096), (4096, 8192), (8192, 16384)]


def test_rows_hold_the_means_of_the_curves(finished):
    rows, curves, _ = finished
    by_label = {one.label: one.scores["perplexity"] for one in curves}
    assert list(by_label) == ["unpatched", "cropping", "yarn", "abf:rope_theta=1e+06"]
    for label, values in by_label.items():
        # Position p, counted from 1, is entry p - 2; documents that end inside a bucket stay out of it.
        inside = np.concatenate([curve[63:127] for curve in values if len(curve) >= 127])
        row = find(rows, label, 64, 128)
        assert row["nll"] == pytest.approx(inside.mean(), rel=1e-6)
        assert (row["documents"], row["tokens"]) == (3, len(inside))
        prefix = np.concatenate([curve[:127] for curve in values if len(curve) >= 127])
        assert find(rows, label, 0, 128, "prefix")["nll"] == pytest.approx(prefix.mean(), rel=1e-6)
    assert find(rows, "yarn", 128, 256)["documents"] == 2
    buckets = [r for r in rows if r["method"] == "yarn" and r["measure"] == "bucket" and r["to"] <= 64]
    assert sum(r["tokens"] for r in buckets) == 4 * 63, "every token but the first belongs to one bucket"


def test_differences_are_paired_on_the_same_tokens(finished):
    rows, curves, _ = finished
    values = {one.label: one.scores["perplexity"] for one in curves}
    row = find(rows, "yarn", 64, 128)
    pairs = [(y[63:127], u[63:127]) for y, u in zip(values["yarn"], values["unpatched"], strict=True) if len(y) >= 127]
    assert row["difference"] == pytest.approx(np.concatenate([y - u for y, u in pairs]).mean(), abs=1e-6)
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    zero = find(rows, "unpatched", 64, 128)
    assert zero["difference"] == zero["difference_low"] == zero["difference_high"] == 0


def test_paired_intervals_are_narrower_than_unpaired_ones():
    generator = np.random.default_rng(0)
    hardness = generator.normal(3, 0.5, 30)
    base = [np.full(256, h) for h in hardness]
    better = [np.full(256, h - 0.1 + e) for h, e in zip(hardness, generator.normal(0, 0.01, 30), strict=True)]
    row = measure(better, base, [256], 64, seed=0)[-1]
    assert row["nll_high"] - row["nll_low"] > 10 * (row["difference_high"] - row["difference_low"])
    assert row["difference_high"] < 0


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        counts = generator.integers(50, 150, 40).astype(float)
        sums = counts * generator.normal(2.0, 0.3, 40)
        found = estimate(sums, counts, seed)
        hits += found.low <= 2.0 <= found.high
    assert 178 <= hits <= 199


def test_a_single_document_has_no_interval():
    found = estimate(np.array([10.0]), np.array([5.0]), seed=0)
    assert (found.mean, found.low, found.high) == (2.0, None, None)


def test_rows_say_what_was_in_effect(finished):
    rows, _, folder = finished
    assert read_rows(folder / "rows.jsonl") == json.loads(json.dumps(rows))
    hashes = {row["method"]: row["frequencies_sha256"] for row in rows}
    assert hashes["unpatched"] == hashes["cropping"]
    assert len(set(hashes.values())) == 3
    for row in rows:
        assert row["versions"].keys() == {"python", "torch", "transformers", "rope-scaling"}
        assert {
            "model",
            "data",
            "dtype",
            "device",
            "seed",
            "chunk_size",
            "factor",
            "documents_sha256",
            "arguments",
        } <= row.keys()
    assert rows[0]["documents_skipped"] == 1
    assert find(rows, "yarn", 64, 128)["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)


def test_the_model_is_left_unpatched(tmp_path):
    model = make_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    evaluate(model, make_documents(), METHODS, make_config())
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.config.max_position_embeddings == TRAINED_LENGTH


def test_a_rerun_gives_the_same_rows(finished, tmp_path):
    rows, _, folder = finished
    again, _ = evaluate(make_model("llama"), make_documents(), METHODS, make_config(), tmp_path / "again")
    assert again == rows
    assert (tmp_path / "again" / "rows.jsonl").read_bytes() == (folder / "rows.jsonl").read_bytes()


def test_an_interrupted_run_resumes_at_the_document_where_it_stopped(finished, tmp_path, monkeypatch):
    rows, _, _ = finished
    folder = tmp_path / "interrupted"
    scored = []

    def stop_after(count, error=KeyboardInterrupt):
        def score(model, ids, chunk_size, original=task_module.nll_curve):
            if len(scored) >= count:
                raise error
            scored.append(ids.shape)
            return original(model, ids, chunk_size)

        return score

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(task_module, "nll_curve", stop_after(6))
        evaluate(make_model("llama"), make_documents(), METHODS, make_config(), folder)
    assert not (folder / "rows.jsonl").exists()
    monkeypatch.setattr(task_module, "nll_curve", stop_after(12, AssertionError))
    resumed, _ = evaluate(make_model("llama"), make_documents(), METHODS, make_config(), folder)
    assert len(scored) == 3 * 4, "no document was scored twice"
    assert resumed == rows


def test_more_methods_may_be_added_to_a_folder(finished, monkeypatch):
    rows, _, folder = finished
    more, _ = evaluate(
        make_model("llama"), make_documents(), [*METHODS, parse_method("linear")], make_config(), folder
    )
    assert [row for row in more if row["method"] != "linear"] == rows


def test_a_folder_with_another_run_is_refused_and_left(finished):
    _, _, folder = finished
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(
        RopeScalingError, match=r"holds rows of another run: seed \(there 0, now 7\). Give another `--output`"
    ):
        evaluate(make_model("llama"), make_documents(), METHODS, make_config(seed=7), folder)
    with pytest.raises(RopeScalingError, match="documents_sha256"):
        evaluate(make_model("llama"), make_documents((256, 256)), METHODS, make_config(), folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RopeScalingError, match="exists and holds other files"):
        evaluate(make_model("llama"), make_documents(), METHODS, make_config(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_losses_that_are_not_finite_are_reported_not_averaged(tmp_path):
    model = make_model("llama")
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(RopeScalingError, match="'unpatched' gives losses that are not finite on 'd0'"):
        evaluate(model, make_documents(), METHODS, make_config(), tmp_path / "run")


def test_frequencies_that_change_underway_are_noticed(monkeypatch):
    model = make_model("llama")

    def meddle(model, ids, chunk_size, original=task_module.nll_curve):
        model.model.rotary_emb.inv_freq.mul_(0.5)
        return original(model, ids, chunk_size)

    monkeypatch.setattr(task_module, "nll_curve", meddle)
    with pytest.raises(RopeScalingError, match="frequencies of 'unpatched' changed while it was measured"):
        evaluate(model, make_documents(), METHODS, make_config())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "one or more numbers"),
        ([1], "at least 2; got"),
        ([128, 64], r"must be ascending.*got \[128, 64\]. Give \[64, 128\]"),
        ([64, 64], "without repetition"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(RopeScalingError, match=message):
        evaluate(make_model("llama"), make_documents(), METHODS, make_config(lengths=lengths))


def test_method_texts():
    spec = parse_method("yarn:beta_fast=16,truncate=false")
    assert (spec.method, spec.arguments) == ("yarn", {"beta_fast": 16, "truncate": False})
    assert parse_method("resonance:wrapped=yarn").arguments == {"wrapped": "yarn"}
    assert parse_method('longrope:{"long_factor": [1, 2]}').arguments == {"long_factor": [1, 2]}
    with pytest.raises(RopeScalingError, match="brackets are not closed"):
        parse_method("longrope:{long_factor")
    with pytest.raises(RopeScalingError, match="Unknown method 'yran'"):
        parse_method("yran:beta_fast=16")
    with pytest.raises(RopeScalingError, match="'beta_fast' is not `field=value`"):
        parse_method("yarn:beta_fast")


def test_long_lists_get_short_names_of_their_own():
    one, other = (parse_method(f'longrope:{{"long_factor": {[float(i + k) for i in range(20)]}}}') for k in (1, 2))
    assert one.label != other.label and len(one.label) < 20


def test_a_label_may_stand_in_a_table_once():
    with pytest.raises(RopeScalingError, match="once; given twice: yarn"):
        evaluate(make_model("llama"), make_documents(), [parse_method("yarn")] * 2, make_config())


def test_a_patched_model_is_not_its_own_baseline(tmp_path):
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    with pytest.raises(RopeScalingError, match=r"cannot be its own baseline. Give the unpatched one"):
        evaluate(model, make_documents(), METHODS, make_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(RopeScalingError, match="cannot be its own baseline"):
        evaluate(type(model).from_pretrained(tmp_path), make_documents(), METHODS, make_config())


def test_a_method_may_bring_its_own_factor():
    lengths = {"yarn": 512, "yarn:factor=2": 128, "yarn:target_length=128": 128, "yarn:factor=2+rerope": 128}
    for text, length in lengths.items():
        with parse_method(text).patched(make_model("llama"), 8.0) as model:
            assert model.config.max_position_embeddings == length, text
    rows, _ = evaluate(make_model("llama"), make_documents(), [parse_method("yarn:factor=2")], make_config())
    assert find(rows, "yarn:factor=2", 64, 128)["in_effect"] == "yarn:factor=2"


def patch_by_text(model, text, **extent):
    """As `describe`, `export` and recipes patch."""
    methods, arguments = patch_arguments(parse(text), **extent)
    return rope_scaling.patch(model, *methods, **arguments)


@pytest.mark.parametrize(
    "text", ["yarn", "yarn+log_n", "ntk:factor=4+rerope", "rerope+log_n", "drope", "abf:factor=4"]
)
def test_one_text_is_one_model_however_its_extent_is_given(text):
    """By factor or by length, as `describe`, `export` and recipes patch, and as `evaluate` does."""
    model = make_model("llama")
    texts, hashes = set(), set()
    with parse_method(text).patched(model, 4.0):
        hashes.add(frequencies_sha256(model))
        texts.add(read_description(model).slots[0].method)
    for extent in ({"target_length": 256}, {"factor": 4.0, "target_length": None}):
        if "factor=4" in text:
            extent = {}
        patch_by_text(model, text, **extent)
        hashes.add(frequencies_sha256(model))
        texts.add(read_description(model).slots[0].method)
        assert model.config.max_position_embeddings == 256 or not extent
    assert len(hashes) == len(texts) == 1


def test_an_extent_is_given_once():
    with pytest.raises(
        RopeScalingError, match="'yarn:factor=2' sets `factor`, and `target_length` is given beside it"
    ):
        patch_by_text(make_model("llama"), "yarn:factor=2", target_length=256)
    with pytest.raises(RopeScalingError, match="the method has 2. Give one of the two"):
        patch_by_text(make_model("llama"), "yarn:factor=2+log_n", factor=4)
    with pytest.raises(RopeScalingError, match="'yarn' requires a length"):
        patch_by_text(make_model("llama"), "yarn+log_n")


def test_every_method_is_swept_by_default():
    every = set(rope_scaling.METHODS) - {"log_n", "llama4", "constant"}
    assert {spec.method for spec in default_methods("demo", 8.0)} == every
    assert {spec.method for spec in default_methods("other", 8.0)} == every - {"longrope", "dynamic_longrope"}
    # The embedded model's LongRoPE factors were searched for 8x, and are not passed off as those of 4x.
    assert "longrope" not in {spec.method for spec in default_methods("demo", 4.0)}


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_what_a_sweep_chooses_is_in_the_label(factor):
    for spec in default_methods("demo", factor):
        if "group_size" in spec.arguments:
            assert parse_method(spec.label) == spec and spec.label == f"self_extend:group_size={2 * factor:g}"


def test_a_plot_of_more_methods_than_there_are_colours(finished):
    _, curves, _ = finished
    many = {f"method {index}": curves[0].scores["perplexity"] for index in range(70)}
    figure = curves_figure(many, 64, "title")
    drawn = {line.get_label(): line for line in figure.axes[0].lines if line.get_label() in many}
    assert drawn.keys() == many.keys()
    assert all(math.isfinite(y) for line in drawn.values() for y in line.get_ydata())
    assert png(figure).startswith(b"\x89PNG")


def falling(rise=0.0, above=0.0):
    """Curves of two documents that fall from 4 to 2.5 nats, and rise beyond 64 tokens."""
    positions = np.arange(1, 256)
    return [4 - 1.5 * positions / 255 + above + rise * (positions > 64) + 0.01 * index for index in range(2)]


def test_a_model_that_breaks_does_not_set_the_scale_of_losses():
    curves = {"unpatched": falling(6.0), "cropping": falling(), "yarn": falling(above=0.1), "linear": falling(2.0)}
    above = curves_figure(curves, 64, "title").axes[0]
    low, high = above.get_ylim()
    assert low < 2.5 and 4.0 < high < 4.3, "cropping and YaRN fill the axis"
    legend = {text.get_text() for text in above.get_legend().get_texts()}
    assert (
        legend == {"unpatched (up to 9.6)", "cropping", "yarn", "linear (up to 5.6)"} and "cut" in above.get_ylabel()
    )
    curves["unpatched"] = falling(0.5)
    whole = curves_figure({name: curves[name] for name in ("unpatched", "cropping", "yarn")}, 64, "title").axes[0]
    assert {text.get_text() for text in whole.get_legend().get_texts()} == {"unpatched", "cropping", "yarn"}
    assert "cut" not in whole.get_ylabel()
    alone = curves_figure({"unpatched": falling(6.0)}, 64, "title").axes[0]
    assert alone.get_ylim()[1] > 9


def test_tables_and_plot(finished, tmp_path):
    rows, curves, _ = finished
    text = markdown_tables(rows)
    assert "| method | (0,0.5x] | (0.5x,1x] | (1x,2x] | (2x,4x] | (0,4x] |" in text
    assert text.index("| unpatched |") < text.index("| cropping |") < text.index("| yarn |")
    assert "tiny, trained length 64, factor 4, 4 documents of random" in text
    values = {one.label: one.scores["perplexity"] for one in curves}
    figure = curves_figure(values, TRAINED_LENGTH, "title")
    assert png(figure).startswith(b"\x89PNG")
    above, below = ({line.get_label(): line.get_ydata() for line in axes.lines} for axes in figure.axes)
    assert below["yarn"] == pytest.approx(above["yarn"] - above["cropping"]) and "cropping" not in below
    alone = curves_figure({label: values[label] for label in ("unpatched", "cropping")}, TRAINED_LENGTH, "title")
    assert len(alone.axes) == 1
