"""lm-eval's tasks: what it does in silence to long prompts shows, or does not happen."""

import dataclasses
import importlib.util
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model

from rope_scaling import RopeScalingError
from rope_scaling.cli.main import main
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.lm_eval import definitions
from rope_scaling.eval.lm_eval import ruler as generator
from rope_scaling.eval.lm_eval.task import HarnessTask, harness_tasks
from rope_scaling.eval.run import evaluate
from rope_scaling.eval.tasks import Scores, Source, prepare
from rope_scaling.hf.loading import load_tokenizer, model_source


TOKENIZER = model_source("demo")
CONFIG = EvaluationConfig(
    model="tiny",
    data="lm-eval",
    lengths=[512, 1024],
    trained_length=512,
    factor=2.0,
    dtype="float32",
    device="cpu",
    chunk_size=512,
)
SOURCE = Source(lambda: [], load_tokenizer("demo"))


def tiny():
    return make_model("llama", vocab_size=4096, max_position_embeddings=512).eval()


def task(name="niah_single_1", **settings):
    return HarnessTask(name=name, **{"tokenizer": TOKENIZER, "samples": 2} | settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dataclasses.replace(SOURCE, folder=tmp_path_factory.mktemp("harness"), shared={})


@pytest.fixture(scope="module")
def ruler(source):
    """RULER's first task at two lengths."""
    items, skipped = task().items(source, CONFIG, None)
    assert skipped == 0
    return items


def test_every_length_is_made_and_scored(ruler):
    assert [item.length for item in ruler] == [512, 512, 1024, 1024]
    assert len({item.sha256 for item in ruler}) == 4
    prompts = [item.task.doc_to_text(list(item.task.eval_docs)[item.index]) for item in ruler]
    counts = [len(SOURCE.encode(prompt)) for prompt in prompts]
    assert all(0.4 * item.length < count <= item.length for item, count in zip(ruler, counts, strict=True))
    assert all("special magic number" in prompt for prompt in prompts)


@pytest.mark.slow
def test_the_same_seed_makes_the_same_documents_whatever_was_made_before(ruler):
    short = dataclasses.replace(CONFIG, lengths=[512])
    hashes = [
        [item.sha256 for item in task().items(dataclasses.replace(SOURCE, shared={}), config, None)[0]]
        for config in (short, dataclasses.replace(short, seed=1))
    ]
    assert hashes[0] == [item.sha256 for item in ruler[:2]]
    assert not set(hashes[0]) & set(hashes[1])


class Echo(torch.nn.Module):
    """Generates a fixed answer, and records how many tokens it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.given, self.config = SOURCE.encode(answer), [], tiny().config
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def generate(self, input_ids, **_):
        self.given.append(input_ids.shape[1])
        return torch.cat([input_ids, torch.tensor([self.answer]).expand(len(input_ids), -1)], 1)

    def tie_weights(self):
        pass


def scores(items, answer, monkeypatch, method="score"):
    """Scores of a model that always gives this answer."""
    real, echo = tiny(), Echo(answer)
    monkeypatch.setattr(type(real), "generate", lambda self, *args, **kwargs: echo.generate(*args, **kwargs))
    own = task()
    plain = [np.zeros(1)] * len(items)
    if method == "score":
        return [own.score(real, item, CONFIG) for item in items], echo
    return [own.score_cropped(real, item, p, CONFIG) for item, p in zip(items, plain, strict=True)], echo


def test_a_model_that_knows_the_answer_scores_1_and_another_0(ruler, monkeypatch):
    answer = next(iter(ruler[2].task.eval_docs))["outputs"][0]
    found, _ = scores(ruler, f" {answer}.", monkeypatch)
    assert [float(value[0]) for value in found] == [0, 0, 1, 0]
    rows = task().rows(ruler, Scores(found, found, found), CONFIG)
    assert {row["to"]: row["score"] for row in rows} == {512: 0.0, 1024: 0.5}
    assert all(row["harness"].startswith("lm-eval ") for row in rows)


def test_no_prompt_is_cut_unless_for_the_cropping_baseline(ruler, monkeypatch):
    _, whole = scores(ruler[2:3], " 1", monkeypatch)
    assert whole.given[0] > 600
    _, cropped = scores(ruler[2:3], " 1", monkeypatch, "score_cropped")
    assert cropped.given and cropped.given[0] < 512


def test_a_prompt_that_does_not_fit_is_refused(ruler, monkeypatch):
    short = dataclasses.replace(ruler[2], max_length=600)
    with pytest.raises(RopeScalingError, match=r"A prompt of \d+ tokens does not fit in \d+; lm-eval would cut"):
        task().score(tiny(), short, CONFIG)


def test_a_real_forward_pass_goes_through(ruler):
    (value,) = task().score(tiny(), ruler[0], CONFIG)
    assert value in (0.0, 1.0)


@pytest.mark.parametrize("name", ["ruler_vt", "ruler_cwe"])
def test_generators_that_would_never_end_are_refused(name):
    with pytest.raises(RopeScalingError, match=f"generator of '{name}' does not end at 512 tokens; it takes 2048 or"):
        task(name).items(SOURCE, CONFIG, None)


def test_a_generator_that_takes_too_long_is_stopped():
    with pytest.raises(RopeScalingError, match="did not end within 0 seconds at 512 tokens"):
        task(timeout=0).items(SOURCE, CONFIG, None)


def test_documents_are_kept(ruler, source, monkeypatch):
    assert len(list((source.folder / "ruler").glob("*.json"))) == 2
    monkeypatch.setattr(generator.subprocess, "Popen", None)
    assert [item.sha256 for item in task().items(source, CONFIG, None)[0]] == [item.sha256 for item in ruler]


def test_one_process_makes_all_lengths_and_none_depends_on_another(ruler, source, monkeypatch):
    again = dataclasses.replace(source, folder=None)
    monkeypatch.setattr(generator.subprocess, "Popen", None)
    items, _ = task().items(again, dataclasses.replace(CONFIG, lengths=[512]), None)
    assert [item.sha256 for item in items] == [item.sha256 for item in ruler[:2]]
    with pytest.raises(
        RopeScalingError, match=r"could not make the documents of 'niah_single_1' at 512 tokens: .*nowhere"
    ):
        task(tokenizer="./nowhere").items(again, CONFIG, None)


DOCUMENT = {"input": "INPUT", "input_example": "EXAMPLE", "outputs": ["red", "blue"], "max_length": 2048, "index": 0}
DOCUMENT |= {"length": 1, "gen_prefix": "Answer:"}


def test_common_words_get_the_example_of_the_original():
    made = definitions.ruler_task("ruler_cwe", [DOCUMENT])
    text = made.doc_to_text(next(iter(made.eval_docs)))
    assert text.index("EXAMPLE") < text.index("INPUT")


def test_questions_with_several_answers_count_any_of_them():
    made = definitions.ruler_task("ruler_qa_squad", [DOCUMENT])
    document = next(iter(made.eval_docs))
    assert made.process_results(document, ["It is BLUE."]) == {"2048": 1.0}
    assert made.process_results(document, ["It is green."]) == {"2048": 0.0}


def test_groups_stand_for_their_members_and_unknown_names_are_told():
    names = [one.name for one in harness_tasks(["ruler", "niah_single_1"], tokenizer=TOKENIZER)]
    assert names == list(definitions.RULER)
    long = [one.name for one in harness_tasks(["babilong_longctx"], tokenizer=TOKENIZER)]
    assert long == list(definitions.BABILONG)
    with pytest.raises(
        RopeScalingError, match=r"Unknown lm-eval task 'niah_singel_1'. Did you mean 'niah_single_"
    ) as told:
        harness_tasks(["niah_singel_1"], tokenizer=TOKENIZER)
    assert len(str(told.value)) < 500, "not all 10,000 names"


def test_a_task_without_its_data_is_told():
    with pytest.raises(RopeScalingError, match="lm-eval cannot load the task 'longbench_2wikimqa'"):
        task("longbench_2wikimqa").items(SOURCE, CONFIG, None)


def serve(monkeypatch, rows, family):
    """Rows in place of a hub's dataset; returns which one is asked for."""
    asked = []

    def load_dataset(path, name=None, split=None, **_):
        asked.append((path, name, split))
        made = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), made)) if split is None else made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(definitions, "manager", lambda: definitions.family_manager(family))
    return asked


def always(monkeypatch, answer):
    echo = Echo(answer)
    monkeypatch.setattr(type(tiny()), "generate", lambda self, *args, **kwargs: echo.generate(*args, **kwargs))
    return echo


def test_longbench_stands_at_the_length_that_holds_each_document_and_counts_the_rest(monkeypatch):
    rows = [
        {"context": "The cat is red. " * many, "question": "Of what colour is the cat?", "answers": ["red"]}
        for many in (1000, 10, 12, 120, 14)
    ]
    asked = serve(monkeypatch, rows, "longbench")
    own = task("longbench_hotpotqa")
    items, skipped = own.items(SOURCE, CONFIG, None)
    assert asked == [("Xnhyacinth/LongBench", "hotpotqa", None)]
    assert [(item.index, item.length) for item in items] == [(1, 512), (2, 512), (3, 1024)] and skipped == 1
    echo = always(monkeypatch, " Red.")
    found = [own.score(tiny(), item, CONFIG) for item in items]
    assert 512 < echo.given[2] <= 1024 - 32
    assert [row["score"] for row in own.rows(items, Scores(found, found, found), CONFIG)] == [1, 1, 1, 1]
    with pytest.raises(
        RopeScalingError, match=r"No document of 'longbench_hotpotqa' fits in 64 tokens; the shortest takes \d"
    ):
        own.items(SOURCE, dataclasses.replace(CONFIG, lengths=[64]), None)


def test_choices_are_scored_too(monkeypatch):
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    rows = [
        {"question": "Of what colour is the sky?" * many, "choices": choices, "answerKey": "B"} for many in (1, 60)
    ]
    serve(monkeypatch, rows, "arc")
    own = task("arc_easy")
    items, _ = own.items(SOURCE, CONFIG, None)
    assert [(item.length, item.metrics) for item in items] == [(512, ("acc", "acc_norm")), (1024, ("acc", "acc_norm"))]
    model = tiny()
    expected = []
    for item in items:
        document = rows[item.index]
        losses = []
        for choice in choices["text"]:
            prompt = SOURCE.encode(f"Question: {document['question']}\nAnswer:")
            ids = torch.tensor([prompt + SOURCE.encode(f" {choice}")])
            with torch.no_grad():
                found = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            losses.append(float(found.gather(-1, ids[0, len(prompt) :, None]).sum()))
        expected.append(float(losses[1] > losses[0]))
    assert [own.score(model, item, CONFIG)[0] for item in items] == expected


def test_tokenizer_and_lm_eval_model_are_made_once_a_run(monkeypatch):
    from lm_eval.models.huggingface import HFLM

    made = []
    monkeypatch.setattr(
        HFLM, "__init__", lambda self, *a, real=HFLM.__init__, **kw: made.append(1) or real(self, *a, **kw)
    )
    monkeypatch.setattr("rope_scaling.hf.loading.load_tokenizer", None)
    choices = {"text": ["red", "blue"], "label": ["A", "B"]}
    rows = [{"question": "Of what colour is it?" * many, "choices": choices, "answerKey": "B"} for many in (1, 2, 60)]
    serve(monkeypatch, rows, "arc")
    source, model = dataclasses.replace(SOURCE, shared={}), tiny()
    for name in ("arc_easy", "arc_challenge"):
        own = task(name, samples=5)
        items, _ = own.items(source, CONFIG, None)
        for item in items:
            own.score_cropped(model, item, own.score(model, item, CONFIG), CONFIG)
    assert len(items) == 3 and len(made) == 1
    own.score(tiny(), items[0], CONFIG)
    assert len(made) == 2, "another model gets one of its own"


def test_scores_are_those_of_one_version_of_lm_eval(monkeypatch, tmp_path):
    serve(
        monkeypatch,
        [{"context": "The cat is red. " * 10, "question": "Of what colour?", "answers": ["red"]}] * 2,
        "longbench",
    )

    def found(version, **settings):
        monkeypatch.setattr("rope_scaling.eval.lm_eval.task.version", lambda name: version)
        work = prepare([task("longbench_hotpotqa", **settings)], dataclasses.replace(SOURCE, shared={}), CONFIG, None)
        rows, measured = evaluate(tiny(), work, [], CONFIG, tmp_path / "run")
        return {row["harness"] for row in rows}, sum(one.found for one in measured)

    assert found("0.4.9") == ({"lm-eval 0.4.9"}, 0)
    assert found("0.4.9", timeout=7) == ({"lm-eval 0.4.9"}, 6), "how long things may take changes no score"
    with pytest.raises(RopeScalingError, match=r"longbench_hotpotqa.scored_with \(there \{'lm_eval': '0.4.9'\}, now"):
        found("0.4.10")


def test_longbench_by_the_command(monkeypatch, tmp_path, capsys):
    rows = [
        {"context": "The cat is red. " * many, "question": "Of what colour is it?", "answers": ["red"]}
        for many in (300, 10, 50)
    ]
    serve(monkeypatch, rows, "longbench")
    arguments = ["--tasks", "longbench_hotpotqa", "--model", "demo", "--method", "rerope", "--lengths", "1x,2x"]
    with pytest.raises(SystemExit) as stopped:
        main(["harness", *arguments, "--output", str(tmp_path / "out")])
    out = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "Documents skipped because they took more tokens than the longest length, with their answers: 1." in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    scores = {(row["method"], row["to"]) for row in rows if row["metric"] == "score"}
    assert scores == {(method, to) for method in ("unpatched", "cropping", "yarn", "rerope") for to in (256, 512)}
    for again, said in (([], "8 of 8 scores were found"), (["--fresh"], "Documents skipped")):
        with pytest.raises(SystemExit):
            main(["harness", *arguments, *again, "--output", str(tmp_path / "out")])
        out = " ".join(capsys.readouterr().out.split())
        assert said in out and ("were found" in out) == (not again)


def test_babilong_comes_in_the_size_of_each_length(monkeypatch):
    rows = [{"input": "Mary went home. " * 60, "question": "Where is Mary?", "target": "home"}] * 2
    asked = serve(monkeypatch, rows, "babilong")
    own = task("babilong_qa1", samples=1)
    items, skipped = own.items(SOURCE, dataclasses.replace(CONFIG, lengths=[1024, 4096, 5000]), None)
    assert [(name, split) for _, name, split in asked] == [("1k", "qa1"), ("4k", "qa1"), ("4k", "qa1")]
    assert [item.length for item in items] == [1024, 4096, 5000] and skipped == 0
    always(monkeypatch, "The most recent location of Mary is home.")
    assert float(own.score(tiny(), items[0], CONFIG)[0]) == 1
    with pytest.raises(RopeScalingError, match=r"BABILong has texts of 1,024 to 131,072 tokens; got a length of 512"):
        own.items(SOURCE, CONFIG, None)
    with pytest.raises(
        RopeScalingError, match="'babilong_qa7' has no long texts, only its facts; those that have: bab"
    ):
        task("babilong_qa7").items(SOURCE, CONFIG, None)


def test_a_missing_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    with pytest.raises(RopeScalingError, match=r"needs lm_eval: pip install 'rope-scaling\[harness\]'"):
        harness_tasks(["ruler"], tokenizer=TOKENIZER)


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["harness", "--tasks", "ruler", "--model", "demo"])
    assert stopped.value.code == 2 and "Name them, as in `--method self_extend`" in capsys.readouterr().err
    arguments = ["--tasks", "niah_single_1", "--model", "demo", "--method", "angle_clip", "--samples", "1"]
    arguments += ["--lengths", "2x", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["harness", *arguments])
    assert stopped.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["unpatched", "cropping", "yarn", "angle_clip"]
    assert "niah_single_1" in capsys.readouterr().out
