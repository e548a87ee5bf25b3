"""How likely a model finds given answers, without generating: one forward pass an answer, on a cache that is reused.

An answer counts as right if each of its tokens is the most likely one after the tokens before it. That is what greedy
decoding would have written, token for token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rope_scaling.eval.hashes import hash_of
from rope_scaling.hf.compat import cache_argument


_CACHED_TOKENS = 1 << 16
"""Questions on one text go through the model together as long as their copies of the cache hold no more than this."""


@dataclass(frozen=True)
class Question:
    """Tokens that follow a text, and the answer that should follow them."""

    ids: list[int]
    answer: list[int]
    depth: float | None = None
    """Position of the answer in the text, from 0 (its start) to 1 (its end)."""


@dataclass(frozen=True)
class Prompt:
    """A text, and questions about it that do not see each other."""

    context: list[int]
    questions: list[Question]

    @property
    def length(self) -> int:
        """Tokens with the longest question and answer."""
        return len(self.context) + longest(self.questions)


def longest(questions: Sequence[Question]) -> int:
    """Tokens of the longest question with its answer."""
    return max(len(question.ids) + len(question.answer) for question in questions)


@dataclass(frozen=True)
class Trial:
    """Prompts that are scored together; those that begin alike share what they have read."""

    name: str
    prompts: list[Prompt] = field(repr=False)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt of every question."""
        return [prompt.length for prompt in self.prompts for _ in prompt.questions]

    @property
    def sha256(self) -> str:
        """Hash of all token ids, 16 hexadecimal digits."""
        parts = [[prompt.context, *([q.ids, q.answer] for q in prompt.questions)] for prompt in self.prompts]
        return hash_of(repr((max(self.lengths), parts)).encode())

    @property
    def cost(self) -> int:
        """Tokens that go through the model."""
        read, held = 0, list[int]()
        for prompt in self.prompts:
            read += len(prompt.context) - _common(held, prompt.context)
            read += sum(len(question.ids) + len(question.answer) for question in prompt.questions)
            held = prompt.context
        return read

    @property
    def questions(self) -> list[Question]:
        """Those of all prompts, in order."""
        return [question for prompt in self.prompts for question in prompt.questions]


@torch.inference_mode()
def answer_scores(model: Any, prompts: Sequence[Prompt], chunk_size: int) -> np.ndarray:
    """Scores every question of every prompt.

    A text is read once, and what it shares with the one before it is not read again.

    Args:
        model (`nn.Module`): A causal language model of Transformers.
        prompts (list of `Prompt`): The questions of one must not be empty, nor their answers.
        chunk_size (`int`): Tokens of a forward call.

    Returns:
        `np.ndarray`: `[questions, 3]`, float64: whether the answer is right (1 or 0), its log-probability in nats,
        and its number of tokens.
    """
    reader = _Reader(model, chunk_size)
    scores = []
    for prompt in prompts:
        reader.read(prompt.context)
        rows = max(min(_CACHED_TOKENS // max(len(prompt.context), 1), len(prompt.questions)), 1)
        for start in range(0, len(prompt.questions), rows):
            scores.append(reader.ask(prompt.questions[start : start + rows]))
    return np.concatenate(scores)


class _Reader:
    """A model and the text that its cache holds."""

    def __init__(self, model: Any, chunk_size: int):
        self.model, self.chunk_size = model, chunk_size
        self._forget()

    def _forget(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.held: list[int] = []

    def read(self, ids: list[int]) -> None:
        """Brings the cache to hold exactly these tokens."""
        extra = len(self.held) - _common(self.held, ids)
        if extra and not self._croppable():
            self._forget()
        elif extra:
            self.cache.crop(-extra)
            del self.held[-extra:]
        for start in range(len(self.held), len(ids), self.chunk_size):
            self._forward(torch.tensor([ids[start : start + self.chunk_size]]), start, self.cache, logits_to_keep=1)
        self.held = list(ids)

    def ask(self, questions: Sequence[Question]) -> np.ndarray:
        """Scores of questions about the text in the cache, which stays as it is."""
        width = longest(questions)
        # Padding on the right changes nothing: no token sees what comes after it.
        rows = [(question.ids + question.answer) for question in questions]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        first = min(len(question.ids) for question in questions) - 1
        logits = self._forward(ids, len(self.held), self._branch(len(questions)), logits_to_keep=width - first)
        return np.array([_score(row, question, first) for row, question in zip(logits, questions, strict=True)])

    def _branch(self, rows: int) -> Any:
        """A cache of that many rows to go on with; what is read there does not come into this one."""
        if not self._croppable():
            cache = copy.deepcopy(self.cache)
            if rows > 1 and self.held:
                cache.batch_repeat_interleave(rows)
            return cache
        # These layers hold on to what they are given and put together something new at each call: views will do.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            branch: Any = layer
            if branch.is_initialized:
                branch.keys, branch.values = (
                    states.expand(rows, -1, -1, -1) for states in (branch.keys, branch.values)
                )
        return cache

    def _forward(self, ids: torch.Tensor, start: int, cache: Any, **arguments: Any) -> torch.Tensor:
        ids = ids.to(self.model.device)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        given = {"input_ids": ids, "position_ids": positions, cache_argument(self.model): cache, "use_cache": True}
        return self.model(**given, **arguments).logits

    def _croppable(self) -> bool:
        """Whether the cache can take back any number of tokens; layers that forget cannot."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self.cache.layers)


def _score(logits: torch.Tensor, question: Question, begin: int) -> tuple[float, float, int]:
    """Of the logits of one row's tokens from `begin` on."""
    first = len(question.ids) - 1 - begin
    wanted = torch.tensor(question.answer, device=logits.device)
    rows = logits[first : first + len(wanted)].float()
    log_probability = rows.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
    return float(torch.equal(rows.argmax(-1), wanted)), log_probability, len(wanted)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    shortest = min(len(first), len(second))
    same = np.asarray(first[:shortest]) == np.asarray(second[:shortest])
    return shortest if same.all() else int(same.argmin())
