"""Prompts of exact lengths: what tasks that ask about a text have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.scoring.answers import Prompt, Question, Trial, answer_scores
from rope_scaling.eval.tasks.base import Task
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class PromptTask(Task):
    """Prompts of exact lengths in tokens, with questions at their ends. The unit of intervals is the trial.

    A subclass makes the trials in `items`, with `writers` to write them.
    """

    trials: int = 5
    """Prompts of each length, with other text and other answers."""

    def writers(
        self, source: Source, filler: Filler, config: EvaluationConfig, length: int
    ) -> Iterator[tuple[str, Writer]]:
        """The names of the trials of a length, and who writes them: a trial depends on seed, length and its number."""
        if self.trials < 1:
            raise RopeScalingError(f"`trials` of {self.name!r} must be positive; got {self.trials}.")
        for number in range(self.trials):
            rng = random.Random(f"{config.seed} {self.name} {length} {number}")
            yield f"{self.name}, {length} tokens, trial {number}", Writer(source, filler, rng, self.name)

    def filler(self, source: Source, config: EvaluationConfig) -> Filler:
        """The text that hides the answers."""
        return read_filler(source, config.lengths[-1])

    def score(self, model: Any, item: Trial, config: EvaluationConfig) -> np.ndarray:
        """What `answer_scores` gives."""
        return answer_scores(model, item.prompts, config.chunk_size)

    def score_cropped(self, model: Any, item: Trial, plain: np.ndarray, config: EvaluationConfig) -> np.ndarray:
        """The last tokens of each prompt that fit in the trained length, behind the prompt's first."""
        long = np.array(item.lengths) > config.trained_length
        if not long.any():
            return plain
        prompts = [self._crop(prompt, config) for prompt in item.prompts if prompt.length > config.trained_length]
        cropped = plain.copy()
        cropped[long] = answer_scores(model, prompts, config.chunk_size)
        return cropped

    def _crop(self, prompt: Prompt, config: EvaluationConfig) -> Prompt:
        asked = prompt.length - len(prompt.context)
        room = config.trained_length - asked - 1
        if room < 0:
            raise RopeScalingError(
                f"A question of {self.name!r} and its answer have {asked} tokens; the model's trained length is "
                f"{config.trained_length}, so cropping leaves nothing to read. Ask for less."
            )
        return Prompt(prompt.context[:1] + prompt.context[len(prompt.context) - room :], prompt.questions)


@dataclass(frozen=True)
class Filler:
    """A long text as tokens, and which of them end a line or a sentence."""

    ids: list[int]
    enders: list[int]

    @property
    def cuts(self) -> np.ndarray:
        """Where the text may be cut: indices before which a line or sentence has ended, ascending, and both ends."""
        return np.union1d(np.flatnonzero(np.isin(self.ids, self.enders)) + 1, [0, len(self.ids)])


def read_filler(source: Source, length: int) -> Filler:
    """Texts one after the other until there are `length` tokens and as many again to begin at other places.

    Raises:
        RopeScalingError: all texts together are shorter than `length`.
    """
    ids: list[int] = []
    for _, text in source.texts():
        ids += source.encode(text.strip() + "\n\n")
        if len(ids) >= 4 * length:
            break
    if len(ids) < length:
        raise RopeScalingError(
            f"The texts have {len(ids)} tokens together; hiding something among {length} takes more. Give longer "
            "texts or shorter `--lengths`."
        )
    return make_filler(ids, source.tokenizer)


def make_filler(ids: list[int], tokenizer: Any) -> Filler:
    """Tokens of a text, with those that end a line or a sentence."""
    ends = (".", "!", "?", "\n")
    return Filler(ids, [token for token in set(ids) if tokenizer.decode([token]).rstrip(" ").endswith(ends)])


class Writer:
    """Writes prompts for one trial, from its own random numbers."""

    def __init__(self, source: Source, filler: Filler, rng: random.Random, task: str):
        self.source, self.filler, self.rng, self.task = source, filler, rng, task
        self.cuts = filler.cuts

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.source.encode(text)

    def question(self, text: str, answer: str, depth: float | None = None) -> Question:
        """A question and its answer, tokenised together, as they appear in the text.

        Raises:
            RopeScalingError: the tokenizer merges the end of the question with the beginning of the answer.
        """
        ids, both = self.encode(text), self.encode(text + answer)
        if both[: len(ids)] != ids or len(both) == len(ids) or not ids:
            raise RopeScalingError(
                f"{self.task!r}: this tokenizer merges the end of the question {text!r} with the beginning of the "
                f"answer {answer!r}, so no token is the answer's first. Let the question end elsewhere."
            )
        return Question(ids, both[len(ids) :], depth)

    def text(self, length: int) -> Filler:
        """That many tokens of the text, from a random place where a sentence begins.

        Raises:
            RopeScalingError: the fixed parts of the prompt leave no room for it.
        """
        self.check_room(length)
        starts = self.cuts[self.cuts <= len(self.filler.ids) - length]
        start = int(starts[self.rng.randrange(len(starts))])
        return Filler(self.filler.ids[start : start + length], self.filler.enders)

    def check_room(self, length: int) -> None:
        """Raises `RopeScalingError` if a text has that many tokens and they are fewer than none."""
        if length < 0:
            raise RopeScalingError(
                f"{self.task!r}: what is hidden and what is asked have {-length} tokens more than the prompt. Hide "
                "less, or give longer `--lengths`."
            )

    def keys(self, count: int, make: Callable[[random.Random], str]) -> list[str]:
        """Different made-up names."""
        names: dict[str, None] = {}
        while len(names) < count:
            names[make(self.rng)] = None
        return list(names)

    def numbers(self, count: int, digits: int) -> list[str]:
        """Different numbers without a leading zero."""
        if not 1 <= digits <= 30 or count > 9 * 10 ** (digits - 1):
            raise RopeScalingError(f"{self.task!r}: there are no {count} different numbers of {digits} digits.")
        return self.keys(count, lambda rng: str(rng.randrange(10 ** (digits - 1), 10**digits)))
