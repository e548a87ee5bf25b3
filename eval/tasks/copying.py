"""Retrieval that even a very small model learns: repeat text from far back, look up a key in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rope_scaling.demo.retrieval import word
from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.scoring.answers import Prompt, Question, longest
from rope_scaling.eval.tasks.prompts import Writer
from rope_scaling.eval.tasks.retrieval_task import RetrievalTask


@dataclass(frozen=True, kw_only=True)
class Copy(RetrievalTask):
    """Made-up words at the start, and their beginning once more at the end: does the model go on as they did?"""

    name: ClassVar[str] = "copy"
    about: ClassVar[str] = "repeating made-up words over the distance of the whole text"

    trials: int = 20
    span: int = 24
    """Tokens of the words."""
    cue: int = 4
    """Tokens of the words that are given again, so that it is clear where the copy begins."""

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """One prompt, one question."""
        if not 0 < self.cue < self.span:
            raise RopeScalingError(f"`cue` must be positive and less than `span` ({self.span}); got {self.cue}.")
        words = writer.encode(" ".join(word(writer.rng) for _ in range(self.span)))[: self.span]
        first = writer.source.bos + writer.encode('first = """') + words
        again = writer.encode('"""\n\nagain = """')
        text = first + writer.text(length - len(first) - len(again) - self.span).ids
        return [Prompt(text, [Question(again + words[: self.cue], words[self.cue :])])]


@dataclass(frozen=True, kw_only=True)
class KvRetrieval(RetrievalTask):
    """A table of keys and numbers at the start, and each key asked for at the end."""

    name: ClassVar[str] = "kv_retrieval"
    about: ClassVar[str] = "looking keys up in a table at the start of the text"

    trials: int = 20
    num_keys: int = 4
    digits: int = 4
    """Of a number."""

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """One prompt with a question a key."""
        if self.num_keys < 1:
            raise RopeScalingError(f"`num_keys` must be positive; got {self.num_keys}.")
        table = dict(zip(writer.keys(self.num_keys, word), writer.numbers(self.num_keys, self.digits), strict=True))
        lines = "".join(f'    "{key}": {value},\n' for key, value in table.items())
        head = writer.source.bos + writer.encode("table = {\n" + lines + "}\n")
        questions = [writer.question(f'assert table["{key}"] ==', f" {value}") for key, value in table.items()]
        return [Prompt(head + writer.text(length - len(head) - longest(questions)).ids, questions)]
