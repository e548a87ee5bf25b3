"""Which of several choices is the most likely after a long text, as multiple-choice benchmarks are scored.

Nothing is generated: each choice is scored by its log-likelihood after text and question, as a whole and per token.
Items come from a file, or are made from the texts at hand: several passages, of which one was read. The others come
from just before and after what was read; all begin where a sentence begins, have as many tokens and occur once, so
without the text nothing tells them apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.figures import lengths_figure
from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table, accuracy_text, lines_by_length
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.scoring.answers import Prompt, Question, Trial
from rope_scaling.eval.stats import mcnemar, paired, share_right, wilson
from rope_scaling.eval.tasks.base import Picture, Scores, SummaryEntry
from rope_scaling.eval.tasks.prompts import Filler, PromptTask, Writer
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True)
class ChoiceTrial(Trial):
    """A prompt with a question for each choice."""

    right: int
    """Index of the right choice."""
    length: int
    """The evaluated length whose row it counts in."""

    @property
    def rows_sha256(self) -> str:
        """Hash of what is scored, of the right choice and of the length, 16 hexadecimal digits."""
        return hash_of(f"{self.sha256} {self.right} {self.length}".encode())


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(PromptTask):
    """Choices scored by their likelihood."""

    name: ClassVar[str] = "multiple_choice"
    about: ClassVar[str] = "which of several choices is the most likely after a long text"
    skipped_because: ClassVar[str] = "took more tokens than the longest length, with question and choices"
    recognised_by: ClassVar[str] = "choices"

    file: str | None = None
    """JSON lines of `{"context", "question", "choices", "answer"}`, where the answer is a choice or its index. Each
    item counts at the shortest length it fits in. Without a file, items are made from the texts."""
    question: str = "\n\nQuestion: {question}\nAnswer:"
    """Template for questions of the file."""
    answer: str = " {choice}"
    """Template for choices of the file."""
    trials: int = 20
    """Generated items for each length."""
    num_choices: int = 4
    """Choices of a generated item."""
    span: int = 24
    """Tokens of each choice of a generated item."""
    cue: str = "\n\nOne passage of the text above, word for word:\n"
    """Text before the choices of a generated item."""

    def settings(self) -> dict[str, Any]:
        """All settings; of the file its name, since its contents are in the hash of the items."""
        return super().settings() | {"file": None if self.file is None else Path(self.file).name}

    def scored_with(self) -> dict[str, Any]:
        """Nothing: items hold all that is scored."""
        return {}

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[ChoiceTrial], int]:
        """Items of every length, and how many of the file are longer than the longest.

        Raises:
            RopeScalingError: the file cannot be read or nothing in it fits, or the texts are too short or repeat
                themselves too much to make items of.
        """
        if self.file is not None:
            return self._fitting(source, config)
        if self.num_choices < 2 or self.span < 1:
            raise RopeScalingError(
                f"`num_choices` of {self.name!r} must be 2 or more and `span` positive; got {self.num_choices} and "
                f"{self.span}."
            )
        filler = self.filler(source, config)
        starts = unique_starts(filler, self.span)
        trials = []
        for length in config.lengths:
            for number, (name, writer) in enumerate(self.writers(source, filler, config, length)):
                # Each index is right equally often, so that a constant answer scores 1 / choices.
                right = number % self.num_choices
                trials.append(ChoiceTrial(name, [self._make(writer, starts, length, right)], right, length))
        return trials, 0

    def _make(self, writer: Writer, starts: np.ndarray, length: int, right: int) -> Prompt:
        bos, cue, ids = writer.source.bos, writer.encode(self.cue), writer.filler.ids
        room = length - len(bos) - len(cue) - self.span
        writer.check_room(room)
        begin, inside = self._window(writer, starts, room)
        outside = starts[(starts + self.span <= begin) | (starts >= begin + room)]
        distances = np.maximum(begin - outside, outside - begin - room)
        if inside is None or len(outside) < self.num_choices - 1:
            raise RopeScalingError(
                f"The texts do not have {self.num_choices} passages of {self.span} tokens that occur once, one within "
                f"{room} tokens and the others outside of them. Give longer or other texts, or other `span` and "
                f"`num_choices` of {self.name!r}."
            )
        # Passages from further away may be about another subject, which the end of the text alone would show.
        near = max(int((distances < room).sum()), self.num_choices - 1)
        places = writer.rng.sample(outside[np.argsort(distances, kind="stable")][:near].tolist(), self.num_choices - 1)
        places.insert(right, inside)
        questions = [Question(cue, ids[place : place + self.span]) for place in places]
        return Prompt(bos + ids[begin : begin + room], questions)

    def _window(self, writer: Writer, starts: np.ndarray, room: int) -> tuple[int, int | None]:
        """Where a text of `room` tokens begins, and a passage in it; no passage if none has a text around it."""
        for inside in writer.rng.sample(starts.tolist(), len(starts)):
            last = min(inside, len(writer.filler.ids) - room)
            begins = writer.cuts[(writer.cuts >= inside + self.span - room) & (writer.cuts <= last)]
            if len(begins):
                return int(writer.rng.choice(begins)), inside
        return 0, None

    def _fitting(self, source: Source, config: EvaluationConfig) -> tuple[list[ChoiceTrial], int]:
        """Items of the file at the shortest length that holds them, and how many are too long."""
        writer = Writer(source, Filler([], []), random.Random(), self.name)
        trials, tokens = [], []
        for number, item in enumerate(read_items(Path(self.file or "")), 1):
            question = self.question.format(question=item["question"])
            choices = [writer.question(question, self.answer.format(choice=choice)) for choice in item["choices"]]
            prompt = Prompt(source.bos + source.encode(item["context"]), choices)
            length = next((length for length in config.lengths if prompt.length <= length), None)
            tokens.append(prompt.length)
            if length is not None:
                name = f"{self.name}, {length} tokens, item {number}"
                trials.append(ChoiceTrial(name, [prompt], item["answer"], length))
        if not trials:
            raise RopeScalingError(
                f"No item of {self.file!r} fits in {config.lengths[-1]} tokens; the shortest of {len(tokens)} takes "
                f"{min(tokens, default=0)}. Give longer `--lengths`."
            )
        return trials, len(tokens) - len(trials)

    def rows(self, items: Sequence[ChoiceTrial], scores: Scores, config: EvaluationConfig) -> list[Row]:  # type: ignore[override]
        """A row a length: how often the right choice is the most likely, as a whole and per token, and its loss."""
        rows = []
        for length in config.lengths:
            chosen = [index for index, item in enumerate(items) if item.length == length]
            if not chosen:
                continue
            right = [items[index].right for index in chosen]
            own, plain, cropped = (
                [values[index] for index in chosen] for values in (scores.own, scores.unpatched, scores.cropping)
            )
            whole, whole_plain, whole_cropped = (_preferred(part, right, False) for part in (own, plain, cropped))
            nats, nats_plain, nats_cropped = (
                np.array([-values[index, 1] for values, index in zip(part, right, strict=True)])
                for part in (own, plain, cropped)
            )
            counts = np.array([values[index, 2] for values, index in zip(own, right, strict=True)])
            row: Row = {"measure": "choices", "to": length, "trials": len(chosen), **share_right(whole)}
            correct_norm = int(_preferred(own, right, True).sum())
            row |= {"correct_norm": correct_norm, **wilson(correct_norm, len(chosen)).fields("accuracy_norm")}
            row |= {"chance": float(np.mean([1 / len(values) for values in own]))}
            row |= paired("nll", nats, nats_plain, nats_cropped, counts, config.seed)
            row |= {"mcnemar": mcnemar(whole, whole_plain), "mcnemar_to_cropping": mcnemar(whole, whole_cropped)}
            rows.append(row)
        return rows

    @classmethod
    def tables(cls, rows: list[Row]) -> list[Table]:
        """How often the right choice is the most likely, as a whole and per token, and its loss, by length."""
        chance = f"{np.mean([row['chance'] for row in rows]):.0%} by chance, 95% interval"
        losses = lines_by_length(rows, "choices", lambda row: f"{row['nll']:.2f}")
        return [
            Table(
                f"{rows[0]['task']}: right choice the most likely, {chance}",
                lines_by_length(rows, "choices", accuracy_text),
            ),
            Table(
                f"{rows[0]['task']}: right choice the most likely per token, {chance}",
                lines_by_length(rows, "choices", lambda row: accuracy_text(_normalised(row))),
            ),
            Table(f"{rows[0]['task']}: nats a token of the right choice", losses),
        ]

    @classmethod
    def pictures(cls, rows: list[Row], scores: Mapping[str, list[np.ndarray]]) -> Iterator[Picture]:
        """Accuracy by length, over a line for chance."""
        task = rows[0]["task"]
        title = f"{task}: how often the right choice is the most likely, with 95% intervals"
        figure = lengths_figure(rows, "accuracy", rows[0]["trained_length"], title, "accuracy")
        figure.axes[0].axhline(np.mean([row["chance"] for row in rows]), color="grey", linestyle=":")
        yield Picture(task, figure, "how often the right choice is the most likely, by length; dotted, by chance")

    @classmethod
    def summary(cls, rows: list[Row]) -> list[SummaryEntry]:
        """Both accuracies at the longest length; the one per token has no column."""
        task = rows[0]["task"]
        longest = [row for row in rows if row["to"] == row["lengths"][-1]]
        whole = SummaryEntry.of(longest, f"{task}.accuracy", "accuracy", f"{task} at {{longest}}", accuracy_text)
        return [whole, SummaryEntry.of(longest, f"{task}.accuracy_norm", "accuracy_norm")] if longest else []


def unique_starts(filler: Filler, span: int) -> np.ndarray:
    """Where sentences begin whose first `span` tokens occur once in the text, ascending."""
    ids, windows = np.asarray(filler.ids, dtype=np.uint64), len(filler.ids) - span + 1
    if windows < 1:
        return np.zeros(0, dtype=np.int64)
    factors = np.random.default_rng(0).integers(1, 2**63, span, dtype=np.uint64)
    hashes = np.zeros(windows, dtype=np.uint64)
    for offset, factor in enumerate(factors):
        hashes += ids[offset : offset + windows] * factor  # modulo 2**64
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return np.intersect1d(np.flatnonzero(counts[inverse] == 1), filler.cuts)


def read_items(path: Path) -> Iterator[dict[str, Any]]:
    """Items of a file of JSON lines, with the index of the right choice as `answer`.

    Raises:
        RopeScalingError: the file cannot be read, or a line is not an item.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RopeScalingError(f"Cannot read the items in {str(path)!r}: {error}.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _item(line, f"line {number} of {str(path)!r}")


def _item(line: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
        context, question, choices, answer = (item[key] for key in ("context", "question", "choices", "answer"))
    except (ValueError, TypeError, KeyError) as error:
        raise RopeScalingError(
            f"The {where} is not a JSON object of `context`, `question`, `choices` and `answer`: {error!r}."
        ) from None
    texts = [context, question, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) for text in texts) or len(set(choices)) < max(len(choices), 2):
        raise RopeScalingError(f"The {where} must have texts, and two or more different ones as `choices`.")
    index = choices.index(answer) if answer in choices else answer
    if type(index) is not int or not 0 <= index < len(choices):
        raise RopeScalingError(
            f"`answer` of the {where} must be one of its choices or the index of one, from 0; got {answer!r}."
        )
    return item | {"answer": index}


def _preferred(scores: Sequence[np.ndarray], right: Sequence[int], normalised: bool) -> np.ndarray:
    """Whether the right choice has the highest log-likelihood, in total or per token, `[items]`."""
    likelihoods = [values[:, 1] / values[:, 2] if normalised else values[:, 1] for values in scores]
    return np.array([int(values.argmax()) == index for values, index in zip(likelihoods, right, strict=True)])


def _normalised(row: Row) -> Row:
    """The row with the numbers per token in place of the others."""
    ends = {f"accuracy{end}": row[f"accuracy_norm{end}"] for end in ("", "_low", "_high")}
    return row | {"correct": row["correct_norm"], **ends}
