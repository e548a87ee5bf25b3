"""Every task says of a planted model what is true of it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import make_model
from planted import ByPosition, Finder, Knower

from rope_scaling import RopeScalingError
from rope_scaling.eval.documents import Document, Documents
from rope_scaling.eval.suites import check_tasks, make_task, parse_task, read_suite, suite_names
from rope_scaling.eval.tasks import TASKS, RetrievalTask, Scores, Source
from rope_scaling.eval.tasks.repeats import far_repeats
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts
from task_cases import CASES, CONFIG


TOKENIZER = load_tokenizer("demo")
VOCAB = len(TOKENIZER)
RETRIEVAL = [name for name, cls in TASKS.items() if issubclass(cls, RetrievalTask)]


def make_source(**changes):
    return Source(**{"texts": lambda: read_texts("python-reference"), "tokenizer": TOKENIZER} | changes)


@dataclasses.dataclass
class Given(Source):
    """Documents that are tokens already."""

    given: list = dataclasses.field(default_factory=list)

    def documents(self, lengths):
        return Documents(self.given, 0)


def small(name, **settings):
    return make_task(name, CASES[name].settings | settings)


def planted_rows(task, reach):
    """Rows of a model that knows the answers up to `reach`: with the whole text, and of its cropping baseline."""
    items, _ = task.items(make_source(), CONFIG, None)
    model = Knower(TOKENIZER, items, reach)
    own = [task.score(model, item, CONFIG) for item in items]
    cropped = [task.score_cropped(model, item, plain, CONFIG) for item, plain in zip(items, own, strict=True)]
    return [task.rows(items, Scores(scores, own, cropped), CONFIG) for scores in (own, cropped)]


def test_cropping_finds_what_lies_in_the_end_and_no_more():
    _, rows = planted_rows(small("niah_single", depths=[0.0, 0.2, 0.4, 0.75, 1.0]), 256)
    cells = {row["depth"]: row["accuracy"] for row in rows if row["measure"] == "cell" and row["to"] == 512}
    assert cells == {0.0: 0.0, 0.2: 0.0, 0.4: 0.0, 0.75: 1.0, 1.0: 1.0}
    (far,) = [row for row in rows if row["measure"] == "length" and row["to"] == 512]
    assert (far["correct"], far["asked"]) == (6, 15) and far["mcnemar"] == pytest.approx(2 * 0.5**6)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_prompts_have_exactly_the_length_and_hold_the_answers(name):
    items, _ = small(name).items(make_source(), CONFIG, None)
    assert len({item.sha256 for item in items}) == len(items)
    assert sorted(length for item in items for length in set(item.lengths)) == 3 * [256] + 3 * [512]
    for item in items:
        for prompt in item.prompts:
            assert prompt.length == len(prompt.context) + max(len(q.ids) + len(q.answer) for q in prompt.questions)
            assert prompt.context[0] == TOKENIZER.bos_token_id
            text = TOKENIZER.decode(prompt.context)
            for question in prompt.questions:
                for part in TOKENIZER.decode(question.answer).strip().split(", "):
                    assert part in text


def test_needles_lie_at_their_depths_and_between_sentences():
    task = small("niah_single", depths=[0.0, 0.3, 1.0])
    for item in task.items(make_source(), CONFIG, None)[0]:
        places = []
        for prompt in item.prompts:
            before, _, after = TOKENIZER.decode(prompt.context).partition("\nThe access code of")
            if prompt.questions[0].depth < 1:
                assert before.endswith(("\n", ".", "!", "?", " ")), before[-20:]
            places.append(len(before) / (len(before) + len(after)))
        assert [prompt.questions[0].depth for prompt in item.prompts] == [1.0, 0.3, 0.0]
        assert places[0] > 0.8 and 0.1 < places[1] < 0.6 and places[2] < 0.3


def test_the_same_seed_gives_the_same_prompts_whatever_else_is_asked():
    one = small("niah_multikey").items(make_source(), CONFIG, None)[0]
    longer = dataclasses.replace(CONFIG, lengths=[512])
    source = make_source(texts=lambda: [("text", "A sentence that repeats. " * 2000)])
    fixed = [small("niah_multikey").items(source, config, None)[0] for config in (CONFIG, longer)]
    assert fixed[0][3].prompts[0].questions == fixed[1][0].prompts[0].questions
    reseeded = small("niah_multikey").items(make_source(), dataclasses.replace(CONFIG, seed=1), None)[0]
    assert one[0].sha256 != reseeded[0].sha256


def test_nested_prompts_are_the_beginnings_of_one_text_and_share_needles():
    config = dataclasses.replace(CONFIG, lengths=[512, 1024, 2048], trained_length=512)
    (item,), _ = small("niah_nested", depths=5, trials=1).items(make_source(), config, None)
    assert [prompt.length for prompt in item.prompts] == config.lengths
    texts = [prompt.context for prompt in item.prompts]
    assert all(longer[: len(text)] == text for text, longer in itertools.pairwise(texts))
    # At 1024 the needles of depths 0, 1/4 and 1/2 are those of 0, 1/2 and 1 at 512.
    assert [TOKENIZER.decode(text).count("The access code of") for text in texts] == [5, 7, 9]
    for prompt in item.prompts:
        text = TOKENIZER.decode(prompt.context)
        for question in prompt.questions:
            place = text.index(TOKENIZER.decode(question.ids + question.answer)) / len(text)
            assert place == pytest.approx(question.depth, abs=0.15)
    asked = [[q.answer for q in prompt.questions] for prompt in item.prompts]
    assert asked[1][:3] == asked[0][::2]
    model = Finder(VOCAB)
    small("niah_nested", depths=5, trials=1).score(model, item, config)
    assert model.read <= len(texts[-1]) + 15 * 64 < sum(map(len, texts))


def test_a_single_needle_grid_reads_less_than_a_prompt_each():
    task, model = small("niah_single", depths=10, trials=1), Finder(VOCAB)
    config = dataclasses.replace(CONFIG, lengths=[512])
    (item,), _ = task.items(make_source(), config, model)
    task.score(model, item, config)
    assert model.read <= (1 + 10 / 2) * 512 + 10 * 64 < 0.75 * 10 * 512


# Protocols ---------------------------------------------------------------------------------------------------------


def planted_documents(*lengths):
    return [Document(f"d{length}", torch.ones(length, dtype=torch.int64)) for length in lengths]


def protocol(name, model, lengths, documents, **settings):
    config = dataclasses.replace(CONFIG, lengths=lengths, trained_length=16)
    task = make_task(name, settings)
    own = [task.score(model, item, config) for item in documents]
    cropped = [task.score_cropped(model, item, plain, config) for item, plain in zip(documents, own, strict=True)]
    rows = task.rows(documents, Scores(own, own, cropped), config)
    return {row["to"]: row for row in rows}


def loss(position):
    """Falls with the position up to 15, and is high from 16 on: a model that breaks beyond its trained length."""
    return 4.0 - position * 0.1 if position < 16 else 8.0


def test_the_protocols_of_the_papers_on_a_planted_model():
    """Two documents of 40 and 24 tokens at L = 16 and 24, worked out by hand from each definition."""
    model, documents = ByPosition(loss), planted_documents(40, 24)
    nats = [loss(p) for p in range(64)]

    truncate = protocol("yarn_truncate", model, [16, 24], documents)
    assert truncate[16]["nll"] == pytest.approx(np.mean(nats[:15]), abs=1e-5)
    assert truncate[24]["nll"] == pytest.approx(np.mean(nats[:23]), abs=1e-5)

    # Stride 8: a document of T tokens has T - 1 behind the BOS. The first window scores L - 1 tokens, later ones the
    # 8 (at most) new ones at its end.
    def windows(length, total):
        found, done, start = [], 0, 0
        while done < total - 1:
            end = min(start + length - 1, total - 1)
            found.append(nats[done - start : end - start])
            start, done = start + 8, end
        return found

    for length in (16, 24):
        both = windows(length, 40) + windows(length, 24)
        yarn = protocol("yarn_stride", model, [16, 24], documents, stride=8)[length]
        pose = protocol("pose_stride", model, [16, 24], documents, stride=8)[length]
        assert yarn["nll"] == pytest.approx(np.mean([np.mean(window) for window in both]), abs=1e-5)
        assert pose["nll"] == pytest.approx(np.mean(np.concatenate(both)), abs=1e-5)
        assert yarn["nll"] != pytest.approx(pose["nll"], abs=1e-3)

    (stream,) = planted_documents(64)
    for length in (16, 24):
        found = protocol("longlora_stream", model, [16, 24], [stream], stride=8)[length]
        assert found["nll"] == pytest.approx(np.mean(nats[: length - 1]), abs=1e-5)
        assert found["tokens_read"] == length * len(range(0, 64 - length + 1, 8))
        assert found["nll_low"] is None, "windows of one stream are not independent"


def test_protocols_dilute_what_the_bucket_shows():
    """At L = 24 of a model that breaks at 16: the loss there is 8 nats; no protocol says so, PoSE's is nearest."""
    model, documents = ByPosition(loss), planted_documents(200)
    found = {
        name: protocol(name, model, [24], documents, **({} if name == "yarn_truncate" else {"stride": 4}))[24]["nll"]
        for name in ("yarn_truncate", "yarn_stride", "pose_stride", "longlora_stream")
    }
    assert found["yarn_truncate"] < 5 and found["longlora_stream"] < 5
    assert 7 < found["pose_stride"] < 8 and 7 < found["yarn_stride"] < 8


def test_cropped_protocols_use_windows_of_the_trained_length():
    model, documents = ByPosition(loss), planted_documents(40)
    rows = protocol("pose_stride", model, [16, 24], documents, stride=8)
    assert rows[16]["to_cropping"] == 0
    assert rows[24]["to_cropping"] == pytest.approx(rows[24]["nll"] - rows[16]["nll"], abs=1e-5)


def test_a_stream_runs_documents_together_without_bos():
    items, _ = make_task("longlora_stream", {}).items(make_source(max_documents=2, pieces=True), CONFIG_8, None)
    documents = make_source(max_documents=2, pieces=True).documents(CONFIG_8.lengths).items
    assert items[0].ids.tolist() == [token for one in documents for token in one.ids[1:].tolist()]


CONFIG_8 = dataclasses.replace(CONFIG, lengths=[512, 1024])


# Context ------------------------------------------------------------------------------------------------------------


def test_context_gain_scores_the_same_tokens_and_sees_what_is_used():
    """The loss falls by 0.1 nats for every token of context up to 24: the gain of 24 over 16 is 0.8 nats."""
    model = ByPosition(lambda position: 4.0 - 0.1 * min(position, 24))
    task = make_task("context_gain", {"num_targets": 2})
    config = dataclasses.replace(CONFIG, lengths=[16, 24, 48], trained_length=16)
    assert task.windows(config) == [8, 16, 24, 48]
    documents = planted_documents(48, 30)
    own = [task.score(model, item, config) for item in documents]
    assert [values.shape for values in own] == [(4, 2), (3, 2)]
    cropped = [task.score_cropped(model, item, plain, config) for item, plain in zip(documents, own, strict=True)]
    rows = {row["to"]: row for row in task.rows(documents, Scores(own, own, cropped), config)}
    assert rows[24]["gain"] == pytest.approx(0.8, abs=1e-4) and rows[8]["gain"] == pytest.approx(-0.8, abs=1e-4)
    assert rows[48]["gain"] == pytest.approx(np.mean([4 - 0.1 * p for p in (13, 14)]) - 1.6, abs=1e-4)
    assert rows[24]["to_cropping"] == pytest.approx(-0.8, abs=1e-4)
    assert (rows[24]["documents"], rows[48]["documents"]) == (2, 1)


def test_key_tokens_are_those_that_far_context_makes_predictable(tmp_path):
    """A text whose end repeats its beginning: the copy is key where the short context does not reach the original."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, VOCAB, (600,), generator=generator)
    ids = torch.cat([torch.tensor([TOKENIZER.bos_token_id]), words, words[:100]])
    text = [Document("copy", ids)]
    config = dataclasses.replace(CONFIG, lengths=[len(ids)], trained_length=256)
    task = make_task("key_tokens", {"short_context": 128, "evaluator_method": "unpatched"})
    source = Given(lambda: [], TOKENIZER, folder=tmp_path, given=text)
    model = Finder(VOCAB)
    (item,), _ = task.items(source, config, model)
    assert item.mask[:600].sum() == 0
    assert item.mask[604:].mean() > 0.95
    read = model.read
    again, _ = task.items(source, config, model)
    assert model.read == read and (again[0].mask == item.mask).all(), "masks are kept"
    with pytest.raises(RopeScalingError, match="No token of these documents is a key token"):
        make_task("key_tokens", {"short_context": 64, "evaluator_method": "unpatched"}).items(
            source, config, Finder(VOCAB, reach=0)
        )


def test_repeats_are_what_cropping_cannot_copy():
    """`a b c` stands at 1, at 5 (near) and at 15 (far from 5); a model that knows far repeats gains on those alone."""
    a, b, c = 3, 4, 5
    ids = torch.tensor([0, a, b, c, 7, a, b, c, *range(20, 27), a, b, c, 8, 9])
    assert far_repeats(ids.tolist(), ngram=3, distance=8).nonzero()[0].tolist() == [16]
    assert not far_repeats(ids.tolist(), ngram=3, distance=10).any(), "10 tokens back is within 10"
    config = dataclasses.replace(CONFIG, lengths=[8, len(ids)], trained_length=8)
    task = make_task("repeats", {"ngram": 3})
    source = Given(lambda: [], TOKENIZER, given=[Document("x", ids)])
    items, _ = task.items(source, config, None)
    plain, knowing = np.full(len(ids) - 1, 4.0), np.full(len(ids) - 1, 4.0)
    knowing[16] = 1.0
    repeats, others = task.rows(items, Scores([knowing], [plain], [plain]), config)
    assert (repeats["measure"], repeats["tokens"], repeats["to_cropping"]) == ("repeats", 1, -3)
    assert (others["measure"], others["tokens"], others["to_cropping"]) == ("others", len(ids) - 8 - 1, 0)
    assert task.stored_as(config) == make_task("perplexity", {}).stored_as(config), "one pass serves both"
    with pytest.raises(RopeScalingError, match="needs a length beyond the trained one"):
        task.items(source, dataclasses.replace(config, lengths=[8]), None)


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("niah_single", {"depths": [0.5, 1.5]}, "different depths between 0 and 1; got"),
        ("niah_single", {"depths": 0}, "positive number of depths"),
        ("niah_multikey", {"trials": 0}, "`trials` of 'niah_multikey' must be positive"),
        ("niah_multikey", {"depths": 60}, "tokens more than the prompt. Hide less, or give longer"),
        ("niah_nested", {"depths": 60}, "tokens more than the prompt. Hide less, or give longer"),
        ("niah_multivalue", {"num_values": 1}, "must be 2 or more"),
        ("niah_single", {"digits": 0}, "no 1 different numbers of 0 digits"),
        ("copy", {"cue": 40}, "`cue` must be positive and less than `span`"),
        ("kv_retrieval", {"num_keys": 0}, "`num_keys` must be positive"),
        (
            "niah_single",
            {"question": "\nThe access code of {key} is ", "answer": "{value}"},
            "merges the end|no token",
        ),
        ("yarn_stride", {"stride": 256}, "less than the shortest length 256"),
        ("context_gain", {"num_targets": 128}, "less than half the trained length"),
        ("key_tokens", {"short_context": 4}, "must be 8 or more tokens"),
        ("repeats", {"ngram": 1}, "`ngram` must be 2 or more"),
    ],
)
def test_settings_that_make_no_sense(name, settings, message):
    task = make_task(name, settings)
    if "is " in settings.get("question", ""):
        pytest.importorskip("transformers")
        source = make_source(tokenizer=merging_tokenizer())
    else:
        source = make_source()
    with pytest.raises(RopeScalingError, match=message):
        task.items(source, CONFIG, make_model("llama"))


def merging_tokenizer():
    """One that takes a space and the digit after it for one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {chr(i): i for i in range(32, 127)} | {f" {d}": 200 + d for d in range(10)} | {"\n": 10}
    merges = [(" ", str(d)) for d in range(10)]
    model = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_texts_that_are_too_short():
    source = make_source(texts=lambda: [("short", "Not much. " * 20)])
    for name in ("niah_single", "copy"):
        with pytest.raises(RopeScalingError, match="tokens together; hiding something among 512 takes more"):
            small(name).items(source, CONFIG, None)
    with pytest.raises(RopeScalingError, match="No document has"):
        make_task("context_gain", {}).items(source, CONFIG, None)
    with pytest.raises(RopeScalingError, match="needs a length beyond the trained one"):
        make_task("context_gain", {}).items(source, dataclasses.replace(CONFIG, lengths=[256]), None)


def test_a_tokenizer_without_bos_or_padding():
    source = make_source(tokenizer=merging_tokenizer())
    task = small("kv_retrieval")
    (item, *_), _ = task.items(source, dataclasses.replace(CONFIG, lengths=[512]), None)
    assert len(item.prompts[0].context) + max(len(q.ids) + len(q.answer) for q in item.prompts[0].questions) == 512


def test_suites_and_tasks_are_strict(tmp_path):
    assert suite_names() == ["full", "paper", "quick"]
    for name in suite_names():
        check_tasks(read_suite(name))
    assert parse_task("niah_single:depths=[0.5],trials=2").depths == [0.5]
    file = tmp_path / "mine.yaml"
    file.write_text("copy:\n  span: 12\n")
    assert [task.span for task in read_suite(str(file))] == [12]
    for text, message in (
        ("copi", "Unknown task 'copi'. Did you mean 'copy'?"),
        ("copy:spam=3", "Unknown task 'copy' field `spam`. Did you mean `span`?"),
        ("copy:span=wide", "`span`: input should be a valid integer.*; got 'wide'"),
    ):
        with pytest.raises(RopeScalingError, match=message):
            parse_task(text)
    with pytest.raises(RopeScalingError, match="Unknown suite 'fast'"):
        read_suite("fast")
    with pytest.raises(RopeScalingError, match="Cannot read the suite"):
        read_suite(str(tmp_path / "none.yaml"))
    with pytest.raises(RopeScalingError, match="given twice: copy"):
        check_tasks([make_task("copy", {})] * 2)
