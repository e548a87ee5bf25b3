"""What a recipe trains and measures on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

from transformers import DataCollatorForSeq2Seq

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.documents import Documents, make_documents
from rope_scaling.recipes.config import Recipe
from rope_scaling.texts import read_texts
from rope_scaling.training import PackedCollator, PoseCollator, make_sequences, mix, pack_documents


def training_data(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's training sequences: long ones, short ones mixed in, packed."""
    data = recipe.data
    where = {"column": data.column, "split": data.split, "subset": data.subset}
    cut = {"max_sequences": data.max_sequences, "streaming": data.streaming}
    length = data.text_length or data.sequence_length
    least = 2 if data.layout == "packed" and data.min_length is None else data.min_length
    sequences = make_sequences(partial(read_texts, data.source, **where), tokenizer, length, min_length=least, **cut)
    if data.short_length is not None:
        texts = partial(read_texts, data.short_source or data.source, **where)
        short = make_sequences(texts, tokenizer, data.short_length, **cut)
        means = (length, data.short_length) if data.streaming else None
        sequences = mix(sequences, short, data.short_share, recipe.training.get("seed", 42), means)
    import datasets

    packed = data.layout == "packed"
    if data.streaming:
        arguments = {"rows": sequences, "length": length if packed else None, "numbered": data.layout == "pose"}
        return datasets.IterableDataset.from_generator(_passes, gen_kwargs=arguments)
    return datasets.Dataset.from_list(list(_pack(sequences, length))) if packed else sequences


def _passes(rows: Any, length: int | None, numbered: bool) -> Iterator[dict[str, Any]]:
    """A stream over and over. The Trainer resumes a stream by skipping batches of its first epoch, so that one has to
    last for the whole run."""
    for epoch in count():
        found = False
        for row in rows if length is None else _pack(rows, length):
            found = True
            yield {**row, "epoch": epoch} if numbered else row
        if not found:
            raise RopeScalingError("No document of the stream is long enough for training. Give longer texts.")


def _pack(rows: Any, length: int) -> Iterator[dict[str, list[int]]]:
    yield from pack_documents((row["input_ids"] for row in rows), length)


def make_collator(recipe: Recipe, tokenizer: Any, target: int) -> Any:
    """What makes batches of the recipe's layout."""
    data = recipe.data
    if data.layout == "packed":
        return PackedCollator(tokenizer.pad_token_id)
    if data.layout == "pose":
        seed = recipe.training.get("seed", 42)
        return PoseCollator(target, tokenizer.pad_token_id, data.num_chunks, data.sequence_length, seed)
    return DataCollatorForSeq2Seq(tokenizer)


def evaluation_documents(recipe: Recipe, tokenizer: Any, lengths: list[int]) -> Documents:
    """Documents to measure on."""
    wanted = recipe.evaluation
    texts = read_texts(wanted.source, column=wanted.column, split=wanted.split, subset=wanted.subset)
    return make_documents(texts, tokenizer, lengths, pieces=wanted.pieces, max_documents=wanted.max_documents)
