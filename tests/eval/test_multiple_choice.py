"""Items of a file, and what is honest about those that are made."""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import torch
from planted import Finder, Planted

from rope_scaling import RopeScalingError
from rope_scaling.eval.suites import make_task, parse_task
from rope_scaling.eval.tasks import Scores, Source
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts
from task_cases import CONFIG


TOKENIZER = load_tokenizer("demo")
SOURCE = Source(lambda: read_texts("python-reference"), TOKENIZER)
WORDS = " ".join(f"Line {number} is blue." for number in range(200))
ITEM = {"context": "The sky is blue. ", "question": "Of what colour is it?", "choices": ["red", "blue"], "answer": 1}


def written(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return make_task("multiple_choice", {"file": str(path)})


def accuracies(task, model, config=CONFIG, source=SOURCE):
    items, _ = task.items(source, config, None)
    own = [task.score(model, item, config) for item in items]
    return [(row["accuracy"], row["accuracy_norm"]) for row in task.rows(items, Scores(own, own, own), config)]


class Guesser(Planted):
    """Likelihoods that have nothing to do with the text."""

    def logits_at(self, tokens, position):
        seed = zlib.crc32(tokens[-3:].tobytes())  # the same in every process, as `hash` is not
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed))


def test_one_passage_was_read_and_nothing_else_tells_it_apart():
    task = parse_task("multiple_choice:trials=8,num_choices=3,span=16")
    items, skipped = task.items(SOURCE, CONFIG, None)
    assert skipped == 0 and len(items) == 16
    everything = SOURCE.encode(read_texts("python-reference").__next__()[1].strip() + "\n\n")
    for item in items:
        (prompt,) = item.prompts
        assert prompt.length == item.length and prompt.context[0] == TOKENIZER.bos_token_id
        assert [len(question.answer) for question in prompt.questions] == [16, 16, 16]
        assert len({tuple(question.ids) for question in prompt.questions}) == 1
        for index, question in enumerate(prompt.questions):
            text, passage = f" {prompt.context} ", f" {question.answer} ".replace("[", "").replace("]", "")
            assert (passage.strip() in text) == (index == item.right)
            assert str(everything[: 4 * 512]).count(passage.strip()) <= 1
    assert np.bincount([item.right for item in items]).tolist() == [6, 6, 4], "each place is right as often"


def test_a_model_that_copies_is_right_and_one_that_guesses_is_right_by_chance():
    assert accuracies(parse_task("multiple_choice:trials=4"), Finder(len(TOKENIZER))) == [(1, 1), (1, 1)]
    task = parse_task("multiple_choice:trials=60,span=4")
    found = accuracies(task, Guesser(len(TOKENIZER)), dataclasses.replace(CONFIG, lengths=[256]))
    assert all(0.1 < share < 0.4 for share in found[0])


def test_items_of_a_file_stand_at_the_shortest_length_that_holds_them(tmp_path):
    long = ITEM | {"context": WORDS[:900]}
    task = written(tmp_path / "items.jsonl", ITEM, long, ITEM | {"context": WORDS * 4}, ITEM | {"answer": "red"})
    items, skipped = task.items(SOURCE, CONFIG, None)
    assert [(item.length, item.right) for item in items] == [(256, 1), (512, 1), (256, 0)] and skipped == 1
    text = TOKENIZER.decode(items[0].prompts[0].context + items[0].questions[1].ids + items[0].questions[1].answer)
    assert text.endswith("The sky is blue. \n\nQuestion: Of what colour is it?\nAnswer: blue")
    assert items[0].sha256 == items[2].sha256 and items[0].rows_sha256 != items[2].rows_sha256
    assert task.settings()["file"] == "items.jsonl" and task.scored_with() == {}
    with pytest.raises(RopeScalingError, match=r"No item of .* fits in 8 tokens; the shortest of 4 takes \d\d"):
        task.items(SOURCE, dataclasses.replace(CONFIG, lengths=[8]), None)


def test_per_token_a_longer_choice_is_not_worse_for_its_length():
    """All tokens are equally likely: in total the shortest wins, per token both tie, and ties go to the first."""
    task = make_task("multiple_choice", {})
    shape = [(0, -2 * math.log(9), 2), (0, -math.log(9), 1)]
    items = [dataclasses.replace(item, right=0) for item in task.items(SOURCE, CONFIG, None)[0][:1]]
    scores = [np.array(shape)]
    (row,) = task.rows(items, Scores(scores, scores, scores), CONFIG)
    assert (row["correct"], row["correct_norm"], row["chance"]) == (0, 1, 0.5)
    assert row["nll"] == pytest.approx(math.log(9))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not a JSON object of `context`, `question`, `choices` and `answer`"),
        ("[1]", "is not a JSON object"),
        (json.dumps({"context": "x"}), "is not a JSON object .*'question'"),
        (json.dumps(ITEM | {"choices": ["a"]}), "two or more different ones as `choices`"),
        (json.dumps(ITEM | {"choices": "ab"}), "two or more different ones as `choices`"),
        (json.dumps(ITEM | {"choices": ["a", "a"]}), "two or more different ones as `choices`"),
        (json.dumps(ITEM | {"context": 7}), "must have texts"),
        (json.dumps(ITEM | {"answer": 2}), "must be one of its choices or the index of one, from 0; got 2"),
        (json.dumps(ITEM | {"answer": "green"}), "got 'green'"),
        (json.dumps(ITEM | {"answer": True}), "got True"),
    ],
)
def test_lines_that_are_no_items(line, message, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(ITEM) + "\n" + line + "\n")
    with pytest.raises(RopeScalingError, match=message):
        make_task("multiple_choice", {"file": str(tmp_path / "items.jsonl")}).items(SOURCE, CONFIG, None)


def test_what_items_cannot_be_made_of(tmp_path):
    with pytest.raises(RopeScalingError, match="Cannot read the items in 'nowhere.jsonl'"):
        make_task("multiple_choice", {"file": "nowhere.jsonl"}).items(SOURCE, CONFIG, None)
    for settings in ({"num_choices": 1}, {"span": 0}):
        with pytest.raises(RopeScalingError, match="`num_choices` .* must be 2 or more and `span` positive; got"):
            make_task("multiple_choice", settings).items(SOURCE, CONFIG, None)
    repeating = Source(lambda: [("text", "The same again. " * 4000)], TOKENIZER)
    with pytest.raises(RopeScalingError, match="do not have 4 passages of 24 tokens that occur once"):
        make_task("multiple_choice", {}).items(repeating, CONFIG, None)
    with pytest.raises(RopeScalingError, match="tokens together; hiding something among 512 takes more"):
        make_task("multiple_choice", {}).items(Source(lambda: [("text", "Short.")], TOKENIZER), CONFIG, None)
