"""Needles in a haystack: sentences hidden in a long text, and asked for at its end.

Prompts are put together from tokens, so that text, needles, question and answer have exactly the length that is
evaluated. A text is read once: `niah_multikey` hides one needle at every depth and asks for each, at the cost of one
pass a prompt (and at the difficulty of telling that many keys apart); `niah_single` and `passkey` hide one needle a
prompt, deepest first, and read again only what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rope_scaling.demo.retrieval import word
from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.scoring.answers import Prompt, Question, longest
from rope_scaling.eval.tasks.prompts import Filler, Writer, make_filler
from rope_scaling.eval.tasks.retrieval_task import RetrievalTask
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class _Niah(RetrievalTask):
    header: str = "Some access codes are hidden in the following text. Remember them; they will be asked for.\n\n"
    needle: str = "\nThe access code of {key} is {value}.\n"
    question: str = "\nThe access code of {key} is"
    answer: str = " {value}"
    digits: int = 7
    """Of a value."""

    def texts(
        self, writer: Writer, length: int, needles: Sequence[Sequence[tuple[float, list[int]]]]
    ) -> list[list[int]]:
        """The same filler with each set of needles in it, `length` tokens.

        A set is pairs of a depth, ascending, and tokens; all sets have as many tokens.
        """
        head = self.head(writer)
        filler = writer.text(length - len(head) - sum(len(ids) for _, ids in needles[0]))
        return [head + hide(filler, pairs) for pairs in needles]

    def head(self, writer: Writer) -> list[int]:
        """What every text begins with."""
        return writer.source.bos + writer.encode(self.header)

    def hidden(self, writer: Writer, count: int) -> list[tuple[tuple[str, str], list[int]]]:
        """As many needles: key and value, and tokens."""
        pairs = zip(writer.keys(count, word), writer.numbers(count, self.digits), strict=True)
        return [((key, value), writer.encode(self.needle.format(key=key, value=value))) for key, value in pairs]

    def ask(self, writer: Writer, key: str, value: str, depth: float | None = None) -> Question:
        """The question for a key."""
        return writer.question(self.question.format(key=key), self.answer.format(value=value), depth)


def hide(filler: Filler, needles: Sequence[tuple[float, list[int]]]) -> list[int]:
    """The filler with needles in it: pairs of a depth, ascending, and tokens. Each begins at a sentence."""
    cuts = filler.cuts
    text, last = list[int](), 0
    for depth, ids in needles:
        place = int(cuts[np.abs(cuts - depth * len(filler.ids)).argmin()])
        text += filler.ids[last:place] + ids
        last = place
    return text + filler.ids[last:]


@dataclass(frozen=True, kw_only=True)
class NiahGrid(_Niah):
    """Needles at depths."""

    depths: int | list[float] = 10
    """Depths from 0, the start of the text, to 1, its end; a number of them means as many evenly spaced."""

    def grid(self) -> list[float]:
        """The depths.

        Raises:
            RopeScalingError: one lies outside 0 to 1, or there is none.
        """
        if isinstance(self.depths, int):
            depths = [round(float(depth), 4) for depth in np.linspace(0, 1, self.depths)] if self.depths > 0 else []
        else:
            depths = list(self.depths)
        if not depths or any(not 0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
            raise RopeScalingError(
                f"`depths` of {self.name!r} must be a positive number of depths, or different depths between 0 and 1; "
                f"got {self.depths}."
            )
        return depths


@dataclass(frozen=True, kw_only=True)
class NiahMultikey(NiahGrid):
    """A needle at every depth, each with its own key, and a question for each, on one reading of the text."""

    name: ClassVar[str] = "niah_multikey"
    about: ClassVar[str] = "a needle at every depth of one text, each asked for by its key"

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """One prompt with a question a depth."""
        depths = sorted(self.grid())
        hidden = self.hidden(writer, len(depths))
        questions = [self.ask(writer, *pair, depth) for depth, (pair, _) in zip(depths, hidden, strict=True)]
        needles = [(depth, ids) for depth, (_, ids) in zip(depths, hidden, strict=True)]
        return [Prompt(text, questions) for text in self.texts(writer, length - longest(questions), [needles])]


@dataclass(frozen=True, kw_only=True)
class NiahSingle(NiahGrid):
    """One needle a prompt, at one depth after the other of the same text."""

    name: ClassVar[str] = "niah_single"
    about: ClassVar[str] = "one needle in the text, at one depth after the other"

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """A prompt a depth, deepest first, so that each begins like the one before it as far as it can."""
        (((key, value), ids),) = self.hidden(writer, 1)
        question = self.ask(writer, key, value)
        depths = sorted(self.grid(), reverse=True)
        texts = self.texts(writer, length - longest([question]), [[(depth, ids)] for depth in depths])
        return [
            Prompt(text, [Question(question.ids, question.answer, depth)])
            for depth, text in zip(depths, texts, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Passkey(NiahSingle):
    """The classic, easy form: one number in a text that says the same few sentences over and over."""

    name: ClassVar[str] = "passkey"
    about: ClassVar[str] = "one number in sentences that repeat; easy"

    header: str = "There is a pass key in the following text. Find it and remember it; it will be asked for.\n\n"
    needle: str = " The pass key is {value}. Remember it: {value} is the pass key."
    question: str = " What is the pass key? The pass key is"
    digits: int = 5
    sentences: str = "The hills are quiet. The river is slow. The clouds drift by. We walk on. Then we turn back. "

    def filler(self, source: Source, config: EvaluationConfig) -> Filler:
        """The sentences, as often as the longest length takes."""
        # Where one repetition meets the next, tokenizers may merge.
        once = len(source.encode(self.sentences * 2)) - len(source.encode(self.sentences))
        if once < 1:
            raise RopeScalingError("`sentences` of 'passkey' must not be empty.")
        times = config.lengths[-1] // once + 2
        return make_filler(source.encode(self.sentences * times)[: config.lengths[-1] + once], source.tokenizer)


@dataclass(frozen=True, kw_only=True)
class _Listed(_Niah):
    num_values: int = 4
    """Values that one question asks for. It is right if all are, in order."""

    def scattered(self, writer: Writer) -> list[float]:
        """As many random depths, ascending."""
        if self.num_values < 2:
            raise RopeScalingError(f"`num_values` of {self.name!r} must be 2 or more; got {self.num_values}.")
        return sorted(writer.rng.random() for _ in range(self.num_values))

    def listed(self, writer: Writer, length: int, pairs: list[tuple[str, str]], keys: str) -> list[Prompt]:
        """One prompt with the pairs hidden in it and one question for all values."""
        needles = [
            (depth, writer.encode(self.needle.format(key=key, value=value)))
            for depth, (key, value) in zip(self.scattered(writer), pairs, strict=True)
        ]
        question = self.ask(writer, keys, ", ".join(value for _, value in pairs))
        return [Prompt(text, [question]) for text in self.texts(writer, length - longest([question]), [needles])]


@dataclass(frozen=True, kw_only=True)
class NiahMultivalue(_Listed):
    """Several values of one key, asked for in the order of the text."""

    name: ClassVar[str] = "niah_multivalue"
    about: ClassVar[str] = "several values of one key, asked for in order"

    question: str = "\nThe access codes of {key}, in the order of the text, are"

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """One prompt, one question."""
        (key,) = writer.keys(1, word)
        values = writer.numbers(self.num_values, self.digits)
        return self.listed(writer, length, [(key, value) for value in values], key)


@dataclass(frozen=True, kw_only=True)
class NiahMultiquery(_Listed):
    """The values of several keys, asked for at once."""

    name: ClassVar[str] = "niah_multiquery"
    about: ClassVar[str] = "the values of several keys, asked for at once"

    question: str = "\nThe access codes of {key}, in this order, are"

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """One prompt, one question."""
        keys = writer.keys(self.num_values, word)
        pairs = list(zip(keys, writer.numbers(self.num_values, self.digits), strict=True))
        return self.listed(writer, length, pairs, f"{', '.join(keys[:-1])} and {keys[-1]}")
