"""A score is found again for the same weights, tokenizer, method, item, settings and versions, and for no others."""

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass

import pytest
import torch
from conftest import TRAINED_LENGTH, make_model, token_ids

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.cli.main import main
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.documents import Document
from rope_scaling.eval.files import read_rows
from rope_scaling.eval.methods import MethodSpec, parse_method
from rope_scaling.eval.run import evaluate
from rope_scaling.eval.scoring.identity import tokenizer_sha256, weights_sha256
from rope_scaling.eval.suites import make_task
from rope_scaling.eval.tasks import Work, curve_task
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.spans import SpanMethod
from rope_scaling.spans.base import beyond, within
from rope_scaling.temperatures import Temperature


LENGTHS = [TRAINED_LENGTH, 2 * TRAINED_LENGTH]
METHODS = [parse_method("self_extend")]


@pytest.fixture
def scored(monkeypatch):
    """The number of tokens of every forward pass over a document."""
    passes = []

    def nll_curve(model, ids, chunk_size, original=curve_task.nll_curve):
        passes.append(ids.shape[1])
        return original(model, ids, chunk_size)

    monkeypatch.setattr(curve_task, "nll_curve", nll_curve)
    return passes


def make_config(**changes):
    values = {"model": "tiny", "data": "random", "lengths": LENGTHS, "trained_length": TRAINED_LENGTH, "factor": 2.0}
    return EvaluationConfig(**values | {"dtype": "float32", "device": "cpu", "chunk_size": 64} | changes)


def make_work(*names, tokenizer="", seeds=(0, 1), **settings):
    documents = [Document(f"d{seed}", token_ids(2 * TRAINED_LENGTH, seed=seed)[0]) for seed in seeds]
    return [Work(make_task(name, settings), documents, 0, tokenizer) for name in names or ("perplexity",)]


def trained_on(model):
    """One step of training with a tiny learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model(token_ids(32), labels=token_ids(32)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def with_one_number_changed(model):
    model.lm_head.weight.data[-1, -1] += 1e-3
    return model


def with_config(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    return change


def version_of(package):
    def change(monkeypatch, real=importlib.metadata.version):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9" if name == package else real(name))

    return change


def spans_with(window):
    """A user's own span method, as it reads after an edit."""

    @dataclass(frozen=True, kw_only=True)
    class Own(SpanMethod):
        name = "own"

        def spans(self, rope):
            return [within(window), beyond(window, query=rope.positions(lambda m: m // 2))]

    return MethodSpec("self_extend", (Own(),), {})


def angles_with(divisor):
    @dataclass(frozen=True, kw_only=True)
    class Own(SpanMethod):
        name = "own"

        def spans(self, rope):
            return [within(20), beyond(20, query=rope.positions(lambda m: m // divisor))]

    return MethodSpec("self_extend", (Own(),), {})


def temperature_with(value):
    @dataclass(frozen=True, kw_only=True)
    class Own(Temperature):
        name = "own"

        def scale(self, positions, trained_length):
            return torch.full(positions.shape, value, dtype=torch.float64)

    return MethodSpec("self_extend", (Own(),), {})


def frequencies_with(value):
    @dataclass(frozen=True, kw_only=True)
    class Own(FrequencyMethod):
        name = "own"

        def frequencies(self, geometry):
            return default_inv_freq(geometry) / value, 1.0

    return MethodSpec("self_extend", (Own(),), {})


CHANGES = {
    "nothing": ({}, {}),
    "one step of training": ({}, {"model": trained_on}),
    "one weight": ({}, {"model": with_one_number_changed}),
    "dtype of the weights": ({}, {"model": lambda model: model.double()}),
    "a setting of the model": ({}, {"model": with_config(attention_dropout=0.5)}),
    "the implementation of attention": ({}, {"model": with_config(_attn_implementation="eager")}),
    "the tokenizer": ({"tokenizer": "a" * 16}, {"tokenizer": "b" * 16}),
    "a field of the method": ({}, {"methods": [MethodSpec("self_extend", "self_extend", {"group_size": 16})]}),
    "bounds of a user's method": ({"methods": [spans_with(20)]}, {"methods": [spans_with(24)]}),
    "angles of a user's method": ({"methods": [angles_with(2)]}, {"methods": [angles_with(3)]}),
    "a user's temperature": ({"methods": [temperature_with(1.1)]}, {"methods": [temperature_with(1.2)]}),
    "a user's frequencies": ({"methods": [frequencies_with(2.0)]}, {"methods": [frequencies_with(3.0)]}),
    "an item": ({}, {"seeds": (0, 2)}),
    "a setting of the task": (
        {"names": ["yarn_stride"], "stride": 32},
        {"names": ["yarn_stride"], "stride": 48},
    ),
    "lengths": ({}, {"lengths": LENGTHS[:1]}),
    "dtype": ({}, {"dtype": "bfloat16"}),
    "device": ({}, {"device": "cuda"}),
    "chunk size": ({}, {"chunk_size": 128}),
    "torch": ({}, {"version": version_of("torch")}),
    "transformers": ({}, {"version": version_of("transformers")}),
    "this library": ({}, {"version": version_of("rope-scaling")}),
}
METHOD_ALONE = {name for name in CHANGES if "method" in name or "user's" in name}


def evaluated(folder, *, model=lambda model: model, methods=METHODS, version=None, fresh=False, **changes):
    """One evaluation with some things changed: rows, and what was measured of each method."""
    work = {name: changes.pop(name) for name in ("tokenizer", "seeds", "stride") if name in changes}
    names = changes.pop("names", [])
    one = model(make_model("llama", initializer_range=0.15))
    return evaluate(one, make_work(*names, **work), methods, make_config(**changes), folder, fresh=fresh)


@pytest.mark.parametrize("name", CHANGES)
def test_scores_are_found_again_only_if_nothing_changed(name, tmp_path, monkeypatch):
    before, after = CHANGES[name]
    rows, _ = evaluated(tmp_path / "run", **before)
    if "version" in after:
        after["version"](monkeypatch)
    changed = {**before, **{key: value for key, value in after.items() if key != "version"}}
    if name == "nothing" or name in METHOD_ALONE:
        _, measured = evaluated(tmp_path / "run", **changed)
        assert [one.found for one in measured] == [2, 2, 2, 2 if name == "nothing" else 0]
        return
    # What is the same for all methods does not meet in one table, and would find nothing if it did.
    with pytest.raises(RopeScalingError, match="holds rows of another run: .*Give another `--output`, or `--fresh`"):
        evaluated(tmp_path / "run", **changed)
    others, _ = evaluated(tmp_path / "other", **changed)
    files = [
        {f"{row['scores']}/{path.name}" for row in some for path in (tmp_path / folder / row["scores"]).glob("*.npy")}
        for folder, some in (("run", rows), ("other", others))
    ]
    shared = 4 if name == "an item" else 0  # the document that is in both, under four methods
    assert len(files[0]) == 8 and len(files[0] & files[1]) == shared


def test_training_on_into_the_same_folder_is_noticed(tmp_path, capsys):
    model = make_model("llama", vocab_size=4096)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 100)
    load_tokenizer("demo").save_pretrained(tmp_path / "model")
    arguments = ["evaluate", "--model", tmp_path / "model", "--data", text, "--lengths", "1x", "--method", "rerope"]

    def command(*more):
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in (*arguments, *more)])
        return stopped.value.code, capsys.readouterr()

    assert command("--output", tmp_path / "out")[0] == 0
    code, again = command("--output", tmp_path / "out")
    assert code == 0 and "3 of 3 scores were found in" in again.out and "`--fresh` measures them again" in again.out
    first = read_rows(tmp_path / "out" / "rows.jsonl")
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    code, refused = command("--output", tmp_path / "out")
    assert code == 2 and "hash of the model's weights and config (there" in refused.err and "`--fresh`" in refused.err
    assert read_rows(tmp_path / "out" / "rows.jsonl") == first
    code, fresh = command("--output", tmp_path / "out", "--fresh")
    assert code == 0 and "were found" not in fresh.out
    second = read_rows(tmp_path / "out" / "rows.jsonl")
    assert len(second) == len(first) and all(
        a["nll"] != b["nll"] for a, b in zip(first, second, strict=True) if "nll" in a
    )


def test_the_default_folder_is_another_for_other_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_model("llama", vocab_size=4096)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 100)
    load_tokenizer("demo").save_pretrained(tmp_path / "model")
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(SystemExit):
            main(["evaluate", "--model", "./model", "--data", "text.txt", "--lengths", "1x", "--method", "rerope"])
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
    assert len(list((tmp_path / "runs").iterdir())) == 2 and "were found" not in capsys.readouterr().out


def test_fresh_measures_anew_what_is_asked_for_and_keeps_the_rest(tmp_path, scored):
    evaluated(tmp_path / "run", methods=[parse_method("linear")])
    evaluated(tmp_path / "run")
    scored.clear()
    _, measured = evaluated(tmp_path / "run", fresh=True)
    assert len(scored) == 3 * 2 and not any(one.found for one in measured)
    assert {row["method"] for row in read_rows(tmp_path / "run" / "rows.jsonl")} >= {"linear", "self_extend"}


def test_methods_added_to_a_run_leave_the_rows_of_others(tmp_path):
    for method in ("ntk", "linear", "ntk"):
        evaluated(tmp_path / "run", methods=[parse_method(method)], names=["perplexity", "yarn_truncate"])
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert list(dict.fromkeys(row["method"] for row in rows)) == ["unpatched", "cropping", "yarn", "ntk", "linear"]
    keys = [(row["task"], row["method"], row["measure"], row.get("from"), row.get("to")) for row in rows]
    assert len(set(keys)) == len(keys)
    at_once, _ = evaluated(
        tmp_path / "other",
        methods=[parse_method("ntk"), parse_method("linear")],
        names=["perplexity", "yarn_truncate"],
    )
    assert rows == json.loads(json.dumps(at_once))


def test_a_label_is_one_method_in_all_tasks_of_a_run(tmp_path):
    evaluated(tmp_path / "run", methods=[spans_with(20)], names=["perplexity", "yarn_truncate"])
    with pytest.warns(
        UserWarning, match="Removed the rows of 'self_extend' in 'yarn_truncate': .* computes something else"
    ):
        evaluated(tmp_path / "run", methods=[spans_with(24)])
    rows = read_rows(tmp_path / "run" / "rows.jsonl")
    assert {row["method"] for row in rows if row["task"] == "yarn_truncate"} == {"unpatched", "cropping", "yarn"}
    assert len({row["method_sha256"] for row in rows if row["method"] == "self_extend"}) == 1


def test_tasks_that_share_scores_measure_them_once(tmp_path, scored):
    _, measured = evaluated(tmp_path / "run", names=["perplexity", "yarn_truncate"])
    assert len(scored) == 3 * 2 and not any(one.found for one in measured)


def test_a_folder_of_the_earlier_format_is_refused(tmp_path):
    evaluated(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    settings.pop("format")
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RopeScalingError, match="it has format 1, of another version of this library; this one writes"):
        evaluated(tmp_path / "run")


def test_costs_are_written_as_they_come(tmp_path, monkeypatch):
    def stop(model, ids, chunk_size, original=curve_task.nll_curve, done=[]):  # noqa: B006
        done.append(ids)
        if len(done) > 3:
            raise KeyboardInterrupt
        return original(model, ids, chunk_size)

    monkeypatch.setattr(curve_task, "nll_curve", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "run")
    costs = read_rows(tmp_path / "run" / "costs.jsonl")
    assert sum(cost["tokens"] for cost in costs) == 3 * 2 * TRAINED_LENGTH
    assert {cost["method"] for cost in costs} == {"unpatched", "yarn"}


def test_writing_scores_takes_no_longer_the_more_there_are(tmp_path):
    evaluated(tmp_path / "run", seeds=range(6))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.npy")}
    (next(iter(before))).unlink()
    evaluated(tmp_path / "run", seeds=range(6))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.npy")}
    assert before.keys() == after.keys() and sum(before[path] != after[path] for path in before) == 1


# Fingerprints -------------------------------------------------------------------------------------------------------


def test_weights_have_the_same_hash_wherever_they_are_loaded_from(tmp_path):
    model = make_model("llama")
    for folder in ("one", "other"):
        model.save_pretrained(tmp_path / folder)
    loaded = [type(model).from_pretrained(tmp_path / folder) for folder in ("one", "other")]
    assert weights_sha256(loaded[0]) == weights_sha256(loaded[1])
    patched = rope_scaling.patch(loaded[0], "rerope")
    assert weights_sha256(rope_scaling.unpatch(patched)) == weights_sha256(loaded[1])


def test_every_tensor_of_a_model_counts():
    model = make_model("llama")
    hashes = [weights_sha256(model)]
    for _, tensor in model.named_parameters():
        tensor.data.view(-1)[tensor.numel() // 2] += 0.01
        hashes.append(weights_sha256(model))
    assert len(set(hashes)) == len(hashes) > 20


def test_offloaded_weights_count():
    from accelerate import cpu_offload

    model, offloaded = make_model("llama"), make_model("llama")
    cpu_offload(offloaded, "cpu")
    before = weights_sha256(offloaded)
    other = make_model("llama")
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.1
    cpu_offload(other, "cpu")
    assert before != weights_sha256(other) and before == weights_sha256(model)


def test_adapters_count():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    hashes = {weights_sha256(model)}
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    hashes.add(weights_sha256(model))
    with model.disable_adapter():
        hashes.add(weights_sha256(model))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = 1.0
    assert len(hashes | {weights_sha256(model)}) == 4


def test_a_tokenizer_is_known_by_what_it_does(tmp_path):
    one = load_tokenizer("demo")
    one.save_pretrained(tmp_path)
    other = type(one).from_pretrained(tmp_path)
    other("some text", truncation=True, max_length=2)  # stays set in the tokenizer
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    other.add_tokens(["<new>"])
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


def test_key_tokens_are_chosen_anew_by_other_weights(tmp_path):
    from rope_scaling.eval.tasks import Source, prepare

    texts = [("text", "def f(x):\n    return x + 1\n" * 200)]
    source = Source(lambda: texts, load_tokenizer("demo"), folder=tmp_path)
    task = make_task("key_tokens", {"gain": -100.0, "loss": 100.0, "short_context": 32})
    model = make_model("llama", vocab_size=4096, initializer_range=0.15)
    kept = []
    for change in (lambda one: None, lambda one: None, trained_on):
        change(model)
        prepare([task], source, make_config(), model)
        kept.append(len(list((tmp_path / "key_tokens").glob("*.npz"))))
    assert kept == [1, 1, 2]


def test_config_of_the_run_does_not_decide_which_weights_are_named(tmp_path):
    config = dataclasses.replace(make_config(), weights_sha256="f" * 16)
    rows, _ = evaluate(make_model("llama"), make_work(), [], config, tmp_path / "run")
    assert {row["weights_sha256"] for row in rows} == {weights_sha256(make_model("llama"))}
