"""Evaluation documents: how text becomes tokens of wanted lengths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.hashes import hash_of
from rope_scaling.lengths import parse_lengths as parse_lengths


@dataclass(frozen=True)
class Document:
    """A document as the model sees it: a BOS if the tokenizer has one, then its tokens, cut at the longest length."""

    name: str
    ids: torch.Tensor
    """Token ids, `[T]`, int64."""

    @property
    def sha256(self) -> str:
        """Hash of the token ids, 16 hexadecimal digits."""
        return hash_of(self.ids.numpy().astype("<i8").tobytes())

    @property
    def cost(self) -> int:
        """Its number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Documents:
    """Documents that are long enough, and how many were not."""

    items: list[Document]
    skipped: int
    """Documents shorter than the shortest length."""


def documents_sha256(documents: Documents) -> str:
    """Hash of the tokens of all documents, 16 hexadecimal digits."""
    return hash_of("".join(document.sha256 for document in documents.items).encode())


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
        texts (iterable of name and text): What `rope_scaling.texts.read_texts` gives.
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
        read = f"the longest of {seen} has {longest} tokens" if seen else "there are none"
        raise RopeScalingError(
            f"No document has {lengths[0]} tokens, the shortest length: {read}. Give longer texts or shorter "
            "`--lengths`."
        )
    return Documents(items, skipped)
