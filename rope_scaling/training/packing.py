"""Several documents in one row, none of which sees another.

Positions restart at every document, as in Transformers' own packing, which cuts its mask there as long as a call keeps
no cache. `document_mask` is for calls that keep one, where stock attention would let documents see each other. Span
methods of this library read the positions themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, check_length


def pack_documents(documents: Iterable[Sequence[int]], length: int) -> Iterator[dict[str, list[int]]]:
    """Fills rows with whole documents, best fit first, and cuts only those longer than a row.

    Args:
        documents (iterable of token ids): Read one by one; a buffer of open rows is all that is held.
        length (`int`): Tokens of a row, at most.

    Yields:
        `dict` with `input_ids` and `position_ids`, of equal length; positions restart at every document.
    """
    check_length("length", length)
    rows: list[list[Sequence[int]]] = []
    for document in documents:
        for start in range(0, len(document), length):
            piece = document[start : start + length]
            room = [length - sum(map(len, row)) for row in rows]
            fitting = [index for index, free in enumerate(room) if free >= len(piece)]
            if fitting:
                rows[min(fitting, key=room.__getitem__)].append(piece)
            else:
                rows.append([piece])
            full = [row for row in rows if sum(map(len, row)) == length]
            if len(rows) - len(full) > _OPEN_ROWS:
                full.append(max(rows, key=lambda row: sum(map(len, row))))
            rows = [row for row in rows if not any(row is done for done in full)]
            yield from map(_row, full)
    yield from map(_row, rows)


_OPEN_ROWS = 64


def _row(documents: list[Sequence[int]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for document in documents for token in document],
        "position_ids": [place for document in documents for place in range(len(document))],
    }


@dataclass
class PackedCollator:
    """Batches rows of `pack_documents`; the first token of a document is nobody's target.

    Rows of unequal length are filled up on the right by a document of padding without loss.
    """

    pad_token_id: int = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """From rows with `input_ids` and `position_ids` to a batch, `[B, T]` each, without an attention mask."""
        longest = max(len(feature["input_ids"]) for feature in features)
        batch: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
        for feature in features:
            ids, positions = (torch.as_tensor(feature[name]) for name in ("input_ids", "position_ids"))
            missing = longest - len(ids)
            labels = ids.masked_fill(positions == 0, -100)
            fills = (torch.full((missing,), self.pad_token_id), torch.full((missing,), -100), torch.arange(missing))
            for name, own, fill in zip(batch, (ids, labels, positions), fills, strict=True):
                batch[name].append(torch.cat([own, fill]))
        return {name: torch.stack(rows) for name, rows in batch.items()}


def document_ids(position_ids: torch.Tensor) -> torch.Tensor:
    """Which document of its row every token belongs to; a position that is not beyond the last begins a new one.

    Args:
        position_ids (`torch.Tensor`): `[B, T]`. Jumps ahead (as in PoSE) stay in their document.

    Returns:
        `torch.Tensor`: `[B, T]`, int64, from 0.
    """
    return torch.nn.functional.pad((position_ids.diff(dim=1) <= 0).long(), (1, 0)).cumsum(1)


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """The causal mask of packed rows, for stock attention in calls that keep a cache.

    Args:
        position_ids (`torch.Tensor`): `[B, T]`.

    Returns:
        `torch.Tensor`: `[B, 1, T, T]`, bool, true where a query (third) sees a key (last): what a model takes as
        `attention_mask`. It takes `B * T * T` bytes; without a cache Transformers needs none.

    Raises:
        RopeScalingError: `position_ids` is not `[B, T]`.
    """
    if position_ids.dim() != 2:
        raise RopeScalingError(f"`position_ids` must be [B, T]; got {tuple(position_ids.shape)}.")
    own = document_ids(position_ids)
    length = position_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=own.device).tril()
    return ((own[:, :, None] == own[:, None]) & causal)[:, None]
