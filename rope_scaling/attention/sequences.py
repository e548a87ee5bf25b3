"""From what a model's forward call is given to documents: which rows, queries and keys belong together, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.spans import Span


@dataclass(frozen=True, eq=False)
class Document:
    """The queries of one document in a call, and where its keys lie.

    Slots count a row's tokens from the first that was ever fed, padding included, cached tokens first.
    """

    rows: slice
    queries: slice
    """Of the call."""
    first_slot: int
    """Slot of the document's first token that is there."""
    positions: torch.Tensor
    """Position of every query within the document, `[T]`, int64."""
    first_position: int
    """Position of the token in `first_slot`."""
    offset: int
    """What the caller's positions have more than these."""
    contiguous: bool
    """Whether position and slot advance together, so that positions of cached keys are known."""


@dataclass(frozen=True)
class KeyStore:
    """Which slots the key tensor of a layer holds: all from `offset` on, but for a gap of `gap` slots after `head`."""

    offset: int = 0
    head: int = 0
    gap: int = 0


@dataclass(frozen=True)
class KeyPositions:
    """The positions of a segment's keys: consecutive, but for one gap where a cache has forgotten some."""

    first: int
    count: int
    """Keys there are."""
    head: int | None = None
    """Keys before the gap; `None` for no gap."""
    gap: int = 0
    """Positions left out after the head."""

    @property
    def last(self) -> int:
        """The last position."""
        return self.first + self.count - 1 + self.gap

    def part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """Positions of the keys `begin .. end - 1`, int64, made on a device."""
        positions = torch.arange(self.first + begin, self.first + end, device=device)
        return positions if self.head is None else positions + self.gap * (positions >= self.first + self.head)

    def indices(self, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the first key at `first` or later, and of the last at `last` or earlier."""
        first, last = first - self.first, last - self.first
        if self.head is not None:
            first = torch.where(first < self.head, first, (first - self.gap).clamp(min=self.head))
            last = torch.where(last < self.head, last, (last - self.gap).clamp(min=self.head - 1))
        return first.clamp(min=0), last.clamp(max=self.count - 1)


@dataclass(frozen=True, eq=False)
class Segment:
    """One document of a batch row, or of several rows whose positions agree."""

    rows: slice
    """Rows of the batch."""
    queries: slice
    """Queries of the call."""
    keys: slice
    """Keys that these queries may see, of the tensor that attention gets."""
    positions: torch.Tensor
    """Position of every query in its document, `[T]`, int64, ascending, on the CPU."""
    key_positions: torch.Tensor | KeyPositions
    """The same for every key, `[S]`."""
    offset: int = 0
    """What the model added to these positions when it rotated queries and keys."""

    def __post_init__(self) -> None:
        given = self.key_positions
        if isinstance(given, torch.Tensor) and int(given[-1]) - int(given[0]) + 1 == len(given):
            object.__setattr__(self, "key_positions", KeyPositions(int(given[0]), len(given)))

    @property
    def num_keys(self) -> int:
        """Keys there are, `S`."""
        return self.key_positions.count if isinstance(self.key_positions, KeyPositions) else len(self.key_positions)

    def query_part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """Positions of the queries `begin .. end - 1`, on a device; made there where they are consecutive."""
        part = self.positions[begin:end]
        if device.type == "cpu" or not len(part):
            return part.to(device)
        first, last = int(part[0]), int(part[-1])
        return torch.arange(first, last + 1, device=device) if last - first + 1 == len(part) else part.to(device)

    def key_part(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """The same for keys."""
        keys = self.key_positions
        return keys.part(begin, end, device) if isinstance(keys, KeyPositions) else keys[begin:end].to(device)

    def bounds(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key that every query sees under a span, as indices into `keys`, `[T]` each."""
        first, last = span.first(self.positions), span.last(self.positions)
        if isinstance(self.key_positions, KeyPositions):
            return self.key_positions.indices(first, last)
        return (
            torch.searchsorted(self.key_positions, first),
            torch.searchsorted(self.key_positions, last, right=True) - 1,
        )


def read_documents(
    rows: int, length: int, past: int, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> list[Document]:
    """The documents of a call.

    Padding is read from the mask: a row's document begins at its first token that is not masked, whatever positions
    the caller gave it. Positions that start again begin a new document; positions that skip ahead stay in theirs.

    Args:
        rows (`int`): Batch size.
        length (`int`): Queries of the call, `T`.
        past (`int`): Tokens in the cache.
        position_ids (`torch.Tensor`, *optional*): `[1 or B, T]`; consecutive from `past` if not given.
        mask (`torch.Tensor`, *optional*): 1 for tokens and 0 for padding, `[B, past + T]` or longer.

    Raises:
        RopeScalingError: a mask with holes or of another form, or packed documents on top of a cache.
    """
    positions = _positions(rows, length, past, position_ids)
    spans = _unmasked(rows, past + length, mask)
    documents: list[Document] = []
    for row in range(rows):
        begin, end = max(spans[row][0] - past, 0), min(spans[row][1] - past, length)
        if begin >= end:
            continue
        its = positions[row if len(positions) > 1 else 0, begin:end]
        if bool((its.diff() == 1).all()):
            found = _contiguous(row, begin, past, spans[row][0], its)
            if documents and _alike(documents[-1], found):
                documents[-1] = replace(documents[-1], rows=slice(documents[-1].rows.start, row + 1))
            else:
                documents.append(found)
            continue
        if past:
            raise RopeScalingError(
                "`position_ids` restart or skip ahead in a call on top of a cache, which does not hold the positions "
                "of its keys. Give packed documents in one call without a cache."
            )
        starts = [0, *((its.diff() <= 0).nonzero()[:, 0] + 1).tolist(), len(its)]
        for start, stop in pairwise(starts):
            part = its[start:stop]
            where = slice(begin + start, begin + stop)
            documents.append(
                Document(slice(row, row + 1), where, where.start, part, int(part[0]), 0, contiguous=False)
            )
    return documents


def segment(document: Document, keys: KeyStore) -> Segment:
    """A document as the engine sees it, for a layer whose key tensor holds the given slots."""
    last_position = int(document.positions[-1])
    if not document.contiguous:
        return Segment(document.rows, document.queries, document.queries, document.positions, document.positions)
    begin_slot = max(document.first_slot, keys.offset)
    first_position = document.first_position + begin_slot - document.first_slot
    first, head, gap = begin_slot - keys.offset, None, 0
    if keys.gap:
        gap = max(keys.head + keys.gap - max(begin_slot, keys.head), 0)
        if begin_slot < keys.head:
            first, head = begin_slot, keys.head - begin_slot
        else:
            first, first_position, gap = max(begin_slot - keys.gap, keys.head), first_position + gap, 0
    positions = KeyPositions(first_position, last_position + 1 - first_position - gap, head, gap)
    where = slice(first, first + positions.count)
    return Segment(document.rows, document.queries, where, document.positions, positions, document.offset)


def _contiguous(row: int, begin: int, past: int, first_slot: int, positions: torch.Tensor) -> Document:
    """A row whose positions advance by one: they tell where its document begins."""
    first = int(positions[0])
    slot = past + begin
    offset = 0
    if first_slot > 0:
        # Padded on the left: counted from the first token, whether the caller counted the padding or not.
        offset = first - (slot - first_slot)
        first = slot - first_slot
    # Position 0 may lie before the first slot (positions that start late) or after it (another document before).
    start = max(slot - first, first_slot)
    return Document(
        rows=slice(row, row + 1),
        queries=slice(begin, begin + len(positions)),
        first_slot=start,
        positions=positions - offset,
        first_position=first - (slot - start),
        offset=offset,
        contiguous=True,
    )


def _alike(one: Document, other: Document) -> bool:
    """Whether two rows, one below the other, can be computed as one."""
    return (
        one.contiguous
        and one.rows.stop == other.rows.start
        and (one.queries, one.first_slot, one.offset) == (other.queries, other.first_slot, other.offset)
        and torch.equal(one.positions, other.positions)
    )


def _positions(rows: int, length: int, past: int, given: torch.Tensor | None) -> torch.Tensor:
    if given is None:
        return torch.arange(past, past + length)[None]
    if given.ndim == 3 and len(given) and bool((given == given[:1]).all()):
        given = given[0]  # one axis for text, in models that also place images
    if given.ndim == 1:
        given = given[None]
    if given.ndim != 2 or given.shape[1] != length or given.shape[0] not in (1, rows):
        raise RopeScalingError(
            f"`position_ids` must be one row of {length} positions, for each of {rows} rows or for all; got shape "
            f"{tuple(given.shape)}. Positions on more than one axis, as images have, are not supported: patch "
            "with a frequency method, such as 'yarn'."
        )
    return given.detach().cpu().long()


def _unmasked(rows: int, total: int, mask: torch.Tensor | None) -> list[tuple[int, int]]:
    """First slot and last slot + 1 of every row's tokens."""
    if mask is None:
        return [(0, total)] * rows
    odd = mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all())
    if mask.ndim != 2 or mask.shape[0] not in (1, rows) or mask.shape[1] < total or odd:
        raise RopeScalingError(
            f"`attention_mask` must be 1 for tokens and 0 for padding, with shape {(rows, total)}; got shape "
            f"{tuple(mask.shape)}, {mask.dtype}. Any other visibility rule must come from the span method."
        )
    seen = mask[:, :total].detach().bool()
    ends = [seen.int().argmax(1), total - seen.flip(1).int().argmax(1), seen.sum(1)]
    first, last, counts = torch.stack(ends).tolist()  # one read of a few numbers a row, wherever the mask is
    if min(counts) == total:
        return [(0, total)] * rows
    found = []
    for row in range(rows):
        at = row if len(seen) > 1 else 0
        begin, end, count = first[at], last[at], counts[at]
        if count and end - begin != count:
            raise RopeScalingError(
                f"`attention_mask` masks tokens in the middle of row {row}. Padding may be on the left, or on the "
                "right as long as nothing follows it."
            )
        found.append((begin, end) if count else (total, total))
    return found
