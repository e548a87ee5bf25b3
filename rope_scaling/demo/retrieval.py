"""In-context retrieval that even a very small language model learns: copy a span, look a key up.

The embedded model is trained on a share of such examples of at most its trained length; the same generators make
longer ones, so that the skill's collapse and repair beyond the trained length can be measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """Token ids, and the half-open spans of them that only retrieval can predict."""

    ids: list[int]
    answers: list[tuple[int, int]]


def word(rng: random.Random) -> str:
    """A pronounceable name that means nothing."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))


def copy_example(rng: random.Random, encode: Encode, filler: Sequence[int], length: int, span: int) -> Example:
    """About `span` tokens of made-up words, `filler`, and the same words again; cut to `length` tokens.

    Args:
        filler (`Sequence[int]`): Text to put between the two, at least `length` tokens of it.
        length (`int`): Length of the example, in tokens.
        span (`int`): Length of the copied text, in tokens; at most a third of `length`.
    """
    words = encode(" ".join(word(rng) for _ in range(span)))[:span]
    first, again = encode('first = """'), encode('"""\n\nagain = """')
    room = length - len(first) - len(again) - 2 * len(words)
    ids = [*first, *words, *filler[: max(room, 0)], *again]
    return Example([*ids, *words][:length], [(len(ids), min(len(ids) + len(words), length))])


def lookup_example(rng: random.Random, encode: Encode, filler: Sequence[int], length: int, num_keys: int) -> Example:
    """A table of `num_keys` keys with four-digit values, `filler`, then every key asked for in another order.

    Args:
        filler (`Sequence[int]`): Text to put between table and questions, at least `length` tokens of it.
        length (`int`): Length of the example, in tokens; questions that do not fit are dropped.
        num_keys (`int`): Number of keys.
    """
    table = {word(rng): rng.randrange(1000, 10000) for _ in range(num_keys)}
    head = encode("table = {\n" + "".join(f'    "{key}": {value},\n' for key, value in table.items()) + "}\n")
    asked = [
        (encode(f'assert table["{key}"] =='), encode(f" {table[key]}")) for key in rng.sample(list(table), len(table))
    ]
    newline = encode("\n")
    tail = sum(len(question) + len(answer) + len(newline) for question, answer in asked)
    ids = [*head, *filler[: max(length - len(head) - tail, 0)]]
    answers = []
    for question, answer in asked:
        if len(ids) + len(question) + len(answer) + len(newline) > length:
            break
        ids += question
        answers.append((len(ids), len(ids) + len(answer)))
        ids += [*answer, *newline]
    return Example(ids, answers)
