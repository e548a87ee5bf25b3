"""Evaluation documents: where their text comes from, and how it becomes tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rope_scaling.demo.corpus import held_out_documents, python_reference
from rope_scaling.errors import RopeScalingError


_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex"}


@dataclass(frozen=True)
class Document:
    """A document as the model sees it: a BOS if the tokenizer has one, then its tokens, cut at the longest length."""

    name: str
    ids: torch.Tensor
    """Token ids, `[T]`, int64."""

    @property
    def sha256(self) -> str:
        """Hash of the token ids, 16 hexadecimal digits."""
        return hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Documents:
    """Documents that are long enough, and how many were not."""

    items: list[Document]
    skipped: int
    """Documents shorter than the shortest length."""


def read_texts(
    source: str, *, column: str = "text", split: str = "test", subset: str | None = None
) -> Iterator[tuple[str, str]]:
    """Names and texts of a source of documents.

    Args:
        source (`str`): `stdlib` (held-out modules of the running Python's standard library), `python-reference` (its
            manual, one long English text), a text file, a folder of text files, a JSON-lines, CSV or Parquet file, or
            the name of a dataset on the hub.
        column (`str`): Column that holds the text, in a table or dataset.
        split (`str`): Split of a hub dataset.
        subset (`str`, *optional*): Configuration of a hub dataset.

    Raises:
        RopeScalingError: there is nothing there, or it cannot be read as text.
    """
    path = Path(source)
    if source == "stdlib":
        yield from held_out_documents().items()
    elif source == "python-reference":
        yield source, python_reference()
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in _TEXT_SUFFIXES and file.is_file()]
        if not files:
            raise RopeScalingError(f"The folder {source!r} holds no text files ({', '.join(sorted(_TEXT_SUFFIXES))}).")
        yield from ((file.relative_to(path).as_posix(), _read(file)) for file in files)
    elif path.suffix in _TABLES and path.exists():
        yield from _read_table(_TABLES[path.suffix], column, "train", data_files=str(path))
    elif path.exists():
        yield path.name, _read(path)
    elif path.is_absolute() or source.startswith((".", "~")) or path.suffix in _TABLES.keys() | _TEXT_SUFFIXES:
        raise RopeScalingError(f"There is no file or folder {source!r} to read documents from.")
    else:
        yield from _read_table(source, column, split, name=subset, streaming=True)


def make_documents(
    texts: Iterable[tuple[str, str]],
    tokenizer: Any,
    lengths: list[int],
    *,
    pieces: bool = False,
    max_documents: int | None = None,
) -> Documents:
    """Tokenises texts, and keeps those of at least the shortest length, cut at the longest.

    Args:
        texts (iterable of name and text): What `read_texts` gives.
        tokenizer: The model's own.
        lengths (`list[int]`): Lengths to evaluate, in tokens with the BOS, ascending.
        pieces (`bool`): Cut each text into as many documents of the longest length as it holds, not only its start.
        max_documents (`int`, *optional*): Stop after that many.

    Raises:
        RopeScalingError: no document is long enough.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    items: list[Document] = []
    longest, skipped, seen = 0, 0, 0
    for name, text in texts:
        seen += 1
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids) + len(bos))
        step = lengths[-1] - len(bos)
        starts = range(0, max(len(ids) - step + 1, 1), step) if pieces else range(1)
        for start in starts:
            piece = torch.tensor(bos + ids[start : start + step], dtype=torch.int64)
            if len(piece) < lengths[0]:
                skipped += 1
                continue
            items.append(Document(f"{name}[{start // step}]" if pieces else name, piece))
            if len(items) == max_documents:
                return Documents(items, skipped)
    if not items:
        found = f"the longest of {seen} has {longest} tokens" if seen else "there are none"
        raise RopeScalingError(
            f"No document has {lengths[0]} tokens, the shortest length: {found}. Give longer texts or shorter "
            "`--lengths`."
        )
    return Documents(items, skipped)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RopeScalingError(f"Cannot read {str(path)!r} as UTF-8 text: {error}") from error


def _read_table(path: str, column: str, split: str, **arguments: Any) -> Iterator[tuple[str, str]]:
    import datasets

    try:
        rows = datasets.load_dataset(path, split=split, **arguments)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RopeScalingError(
            f"Cannot load {arguments.get('data_files', path)!r} as a dataset: {reason} "
            "Give `stdlib`, a file, a folder, or a dataset's name on the hub."
        ) from error
    for index, row in enumerate(rows):
        if column not in row:
            raise RopeScalingError(
                f"The dataset has no column {column!r}; it has {', '.join(row)}. Name one with `--column`."
            )
        yield f"{index:05d}", str(row[column])
