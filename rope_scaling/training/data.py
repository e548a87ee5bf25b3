"""Training sequences from long documents: filtered by length, split without crossing documents, mixed by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rope_scaling.errors import RopeScalingError, check_length, check_number


Texts = Iterable[tuple[str, str]]
"""Names and texts of documents."""


@dataclass(frozen=True)
class Statistics:
    """What a set of training sequences holds."""

    sequences: int
    tokens: int
    longest: int
    """Tokens of the longest sequence."""
    beyond: int
    """Tokens that have at least the trained length of their own document before them."""

    def __str__(self) -> str:
        return (
            f"{self.sequences:,} sequences, {self.tokens:,} tokens, longest {self.longest:,}, "
            f"{self.beyond / max(self.tokens, 1):.0%} of tokens beyond the trained length"
        )


def make_sequences(
    texts: Texts | Callable[[], Texts],
    tokenizer: Any,
    length: int,
    *,
    min_length: int | None = None,
    max_sequences: int | None = None,
    streaming: bool = False,
) -> Any:
    """Cuts documents into training sequences, none of which holds tokens of two documents.

    Every sequence begins with the tokenizer's BOS, if it has one, as a document does in evaluation; the last of a
    document ends with its EOS. Documents and remainders shorter than `min_length` are left out.

    Args:
        texts (iterable of name and text): What `rope_scaling.texts.read_texts` gives, or any other; or a function
            that returns one, which a stream needs, since it begins again every epoch.
        tokenizer: The model's own.
        length (`int`): Tokens of a sequence with its BOS, at most.
        min_length (`int`, *optional*): Tokens of a sequence, at least; by default `length`, so that all are alike.
        max_sequences (`int`, *optional*): Stop after that many.
        streaming (`bool`): Read texts only while training draws sequences; nothing is known about their number then.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` when streaming, with `input_ids` and `labels`.

    Raises:
        RopeScalingError: bad lengths, no document is long enough, or a stream of texts that can be read only once.
    """
    import datasets

    least = check_length("length", length) if min_length is None else check_length("min_length", min_length)
    if least > length:
        raise RopeScalingError(f"`min_length` {least} is more than `length` {length}: no sequence could be both.")
    if streaming:
        if not callable(texts):
            raise RopeScalingError("A stream begins again every epoch: give `texts` as a function that returns them.")
        arguments = {"texts": texts, "tokenizer": tokenizer, "length": length, "least": least}
        stream = datasets.IterableDataset.from_generator(_stream, gen_kwargs=arguments)
        return stream if max_sequences is None else stream.take(max_sequences)
    seen = _Seen()
    rows = []
    for row in _sequences(texts() if callable(texts) else texts, tokenizer, length, least, seen):
        rows.append(row)
        if len(rows) == max_sequences:
            break
    if not rows:
        raise RopeScalingError(
            f"No document is long enough for training: {seen.documents} read, the longest has {seen.longest} tokens, "
            f"and {least} are needed. Give longer texts, or a smaller `min_length`."
        )
    return datasets.Dataset.from_list(rows)


@dataclass
class _Seen:
    documents: int = 0
    longest: int = 0


def _stream(texts: Callable[[], Texts], tokenizer: Any, length: int, least: int) -> Iterator[dict[str, list[int]]]:
    yield from _sequences(texts(), tokenizer, length, least, _Seen())


def _sequences(texts: Texts, tokenizer: Any, length: int, least: int, seen: _Seen) -> Iterator[dict[str, list[int]]]:
    bos, eos = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    step = length - len(bos)
    for _, text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + eos
        seen.documents += 1
        seen.longest = max(seen.longest, len(ids) + len(bos))
        for start in range(0, len(ids), step):
            piece = bos + ids[start : start + step]
            if len(piece) >= least:
                yield {"input_ids": piece, "labels": piece}


def mix(long: Any, short: Any, short_share: float, seed: int = 0, lengths: tuple[float, float] | None = None) -> Any:
    """Interleaves long and short sequences so that short ones make up a share of the *tokens*.

    Ends when either runs out: repeating would overfit, and dropping the rest of the mixture would change its share.

    Args:
        long (`datasets.Dataset` or `datasets.IterableDataset`): Sequences with `input_ids`.
        short (the same): Likewise.
        short_share (`float`): Share of tokens that come from `short`, between 0 and 1.
        seed (`int`): Of the order.
        lengths (`tuple` of two numbers, *optional*): Mean tokens of a long and a short sequence. Counted, except in
            streams.

    Raises:
        RopeScalingError: the share is not between 0 and 1, or a stream comes without lengths.
    """
    import datasets

    if not 0 < check_number("short_share", short_share) < 1:
        raise RopeScalingError(f"`short_share` must lie between 0 and 1; got {short_share}.")
    if lengths is None:
        if not all(hasattr(data, "__len__") for data in (long, short)):
            raise RopeScalingError("A stream cannot be counted: give the mean `lengths` of long and short sequences.")
        mean = [sum(map(len, data["input_ids"])) / len(data) for data in (long, short)]
        lengths = mean[0], mean[1]
    rates = (1 - short_share) / lengths[0], short_share / lengths[1]
    probabilities = [rate / sum(rates) for rate in rates]
    return datasets.interleave_datasets([long, short], probabilities, seed, stopping_strategy="first_exhausted")


def statistics(dataset: Any, trained_length: int) -> Statistics:
    """Counts the tokens of a `datasets.Dataset` with `input_ids`, and those beyond the trained length."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if "position_ids" in dataset.column_names:  # packed
        beyond = sum(sum(place >= trained_length for place in row) for row in dataset["position_ids"])
    else:
        beyond = sum(max(length - trained_length, 0) for length in lengths)
    return Statistics(len(lengths), sum(lengths), max(lengths, default=0), beyond)
