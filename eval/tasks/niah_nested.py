"""Needles in one text that is read once for all lengths: a shorter length is its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.scoring.answers import Prompt, Trial, longest
from rope_scaling.eval.tasks.niah import NiahGrid, hide
from rope_scaling.eval.tasks.prompts import Filler, Writer
from rope_scaling.eval.tasks.source import Source


@dataclass(frozen=True, kw_only=True)
class NiahNested(NiahGrid):
    """The beginnings of one text are the prompts of all lengths, so a grid costs one reading of the longest.

    Needles that lie at a depth of some length are shared with the longer ones wherever they fit: with 10 depths and
    lengths that double, 10 needles at the first, and 5 more at each. A longer prompt therefore has more keys to tell
    apart, and the same needle, in the same place, is asked for at several lengths.
    """

    name: ClassVar[str] = "niah_nested"
    about: ClassVar[str] = "the same with one text, of which shorter lengths are the beginning; cheapest"

    def items(self, source: Source, config: EvaluationConfig, model: Any) -> tuple[Sequence[Trial], int]:
        """Trials with prompts of all lengths."""
        writers = self.writers(source, self.filler(source, config), config, config.lengths[-1])
        return [Trial(name, self.growing(writer, config.lengths)) for name, writer in writers], 0

    def prompts(self, writer: Writer, length: int) -> list[Prompt]:
        """Those of one length alone."""
        return self.growing(writer, [length])

    def growing(self, writer: Writer, lengths: Sequence[int]) -> list[Prompt]:
        """A prompt a length, ascending, each the beginning of the next but for the questions at its end."""
        depths = sorted(self.grid())
        hidden = self.hidden(writer, len(lengths) * len(depths))
        places, asked = shared_places(lengths, depths, near=max(len(ids) for _, ids in hidden))
        questions = [
            [self.ask(writer, *hidden[index][0], depth) for depth, index in zip(depths, chosen, strict=True)]
            for chosen in asked
        ]
        needles = [(place, ids) for place, (_, ids) in zip(places, hidden, strict=False)]
        ends = [length - longest(each) for length, each in zip(lengths, questions, strict=True)]
        texts = self.beginnings(writer, lengths, ends, needles)
        return [Prompt(text, each) for text, each in zip(texts, questions, strict=True)]

    def beginnings(
        self, writer: Writer, lengths: Sequence[int], ends: Sequence[int], needles: Sequence[tuple[float, list[int]]]
    ) -> list[list[int]]:
        """One text with all needles at their places, cut at every end; no needle lies across one."""
        text, texts, begin, used = self.head(writer), list[list[int]](), 0, 0
        filler = writer.text(ends[-1] - len(text) - sum(len(ids) for _, ids in needles))
        waiting = sorted(needles)
        for length, end in zip(lengths, ends, strict=True):
            inside = [(place, ids) for place, ids in waiting if place <= length]
            room = end - len(text) - sum(len(ids) for _, ids in inside)
            writer.check_room(room)
            part = Filler(filler.ids[used : used + room], filler.enders)
            text = text + hide(part, [((place - begin) / (length - begin), ids) for place, ids in inside])
            texts.append(text)
            waiting, begin, used = waiting[len(inside) :], length, used + room
        return texts


def shared_places(lengths: Sequence[int], depths: Sequence[float], near: int) -> tuple[list[float], list[list[int]]]:
    """Places, in tokens, for needles at all depths of all lengths, and the indices of those of each length.

    A place that a shorter length needs serves a longer one that needs one less than `near` tokens away.
    """
    places: list[float] = []
    asked: list[list[int]] = []
    for length in lengths:
        chosen: list[int] = []
        for wanted in (depth * length for depth in depths):
            free = [index for index, place in enumerate(places) if abs(place - wanted) < near and index not in chosen]
            if not free:
                free = [len(places)]
                places.append(wanted)
            chosen.append(min(free, key=lambda index: abs(places[index] - wanted)))
        asked.append(chosen)
    return places, asked
