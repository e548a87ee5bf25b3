"""Scores of answers are those of greedy decoding, and reading a text once changes none of them."""

import copy

import numpy as np
import pytest
import torch
from conftest import strong, token_ids
from planted import Finder
from torch.nn.functional import cross_entropy

import rope_scaling
from rope_scaling.eval.scoring import answers
from rope_scaling.eval.scoring.answers import Prompt, Question, Trial, answer_scores


def tokens(length, seed):
    return token_ids(length, seed=seed)[0].tolist()


def make_prompts():
    """Two texts that begin alike, three questions of different widths on the first, one on the second."""
    text = tokens(120, 0)
    questions = [Question(tokens(n, n), tokens(m, 50 + m)) for n, m in ((5, 3), (9, 1), (2, 4))]
    return [Prompt(text, questions), Prompt(text[:70] + tokens(40, 9), questions[:1])]


@torch.no_grad()
def apart(model, prompts):
    """Every question in a forward call of its own over everything."""
    rows = []
    for prompt in prompts:
        for question in prompt.questions:
            ids = torch.tensor([prompt.context + question.ids + question.answer])
            logits = model(ids, use_cache=False).logits[0, -len(question.answer) - 1 : -1].double()
            wanted = torch.tensor(question.answer)
            nats = cross_entropy(logits, wanted, reduction="sum").item()
            rows.append((float(torch.equal(logits.argmax(-1), wanted)), -nats, len(wanted)))
    return np.array(rows)


METHODS = [None, ("yarn", {"factor": 4}), ("self_extend", {}), ("streaming", {}), ("dynamic_yarn", {}), ("rerope", {})]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "unpatched" if method is None else method[0])
@pytest.mark.parametrize("chunk_size", [16, 1000])
def test_reading_a_text_once_gives_what_separate_calls_give(method, chunk_size):
    model = strong("llama")
    if method is not None:
        rope_scaling.patch(model, method[0], **method[1])
    prompts = make_prompts()
    assert np.allclose(answer_scores(model, prompts, chunk_size), apart(model, prompts), atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gpt_neox"])
def test_caches_that_forget_are_read_again_not_cropped(family):
    model, prompts = strong(family), make_prompts()
    assert np.allclose(answer_scores(model, prompts, 32), apart(model, prompts), atol=1e-4)


def test_one_question_at_a_time_gives_the_same(monkeypatch):
    model, prompts = strong("llama"), make_prompts()
    together = answer_scores(model, prompts, 64)
    monkeypatch.setattr(answers, "_CACHED_TOKENS", 1)
    assert np.allclose(answer_scores(model, prompts, 64), together, atol=1e-5)


def test_right_means_what_greedy_decoding_writes():
    """For answers that greedy decoding gave, and for the same with one token changed."""
    model = strong("llama")
    for seed in range(6):
        context, question = tokens(40, seed), tokens(6, 100 + seed)
        ids = torch.tensor([context + question])
        written = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
        for place in range(-1, 5):
            answer = list(written)
            if place >= 0:
                answer[place] = (answer[place] + 1) % 64
            ((right, _, count),) = answer_scores(model, [Prompt(context, [Question(question, answer)])], 16)
            assert (right, count) == (place < 0, 5)


def test_a_text_is_read_once():
    model = Finder(64)
    prompts = make_prompts()
    answer_scores(model, prompts[:1], 32)
    questions = prompts[0].questions
    padded = max(len(q.ids) + len(q.answer) for q in questions) * len(questions)
    assert model.read == 120 + padded
    assert Trial("t", prompts).cost == 120 + sum(len(q.ids) + len(q.answer) for q in questions) + 40 + 8


@torch.inference_mode()
def test_what_the_cache_holds_survives_questions():
    model = strong("llama")
    reader = answers._Reader(model, 64)
    reader.read(tokens(50, 1))
    before = copy.deepcopy(reader.cache.layers[0].keys)
    reader.ask(make_prompts()[0].questions)
    reader.ask(make_prompts()[0].questions[:1])
    assert torch.equal(reader.cache.layers[0].keys, before)
