"""Positional skip-wise training: short sequences whose positions cover the target length.

Zhu et al., "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training",
https://huggingface.co/papers/2309.10400. A sequence is cut into chunks; each chunk keeps its inner order and starts
a random number of positions after the previous one, so that a model meets every distance up to the target length while
it attends over its trained length only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, check_length


def pose_positions(
    length: int, target_length: int, num_chunks: int = 2, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Positions of one sequence: `num_chunks` runs of consecutive numbers with random skips between them.

    Where chunks end and how far each is moved are both drawn uniformly: ends among all places that leave no chunk
    empty, and starts among all ascending ones that stay below the target length. The first chunk starts at 0, which
    makes distances more even (the paper's section 3).

    Args:
        length (`int`): Tokens of the sequence.
        target_length (`int`): Positions stay below it.
        num_chunks (`int`): Runs; 2 in the paper. A sequence shorter than that gets as many as it has tokens.
        generator (`torch.Generator`, *optional*): Source of randomness.

    Returns:
        `torch.Tensor`: `[length]`, int64, strictly ascending, from 0.

    Raises:
        RopeScalingError: `length` is more than `target_length`, or a number is not positive.
    """
    check_length("length", length)
    check_length("num_chunks", num_chunks)
    if length > check_length("target_length", target_length):
        raise RopeScalingError(
            f"A sequence of {length} tokens does not fit in `target_length` {target_length}. Give shorter sequences "
            "(a `sequence_length` of at most the trained length is what PoSE is for), or a longer target."
        )
    skips = min(num_chunks, length) - 1
    ends = 1 + torch.randperm(length - 1, generator=generator)[:skips].sort().values if length > 1 else torch.zeros(0)
    moves = torch.randint(target_length - length + 1, (skips,), generator=generator).sort().values
    positions = torch.arange(length)
    for end, move, before in zip(ends.tolist(), moves.tolist(), [0, *moves.tolist()], strict=False):
        positions[end:] += move - before
    return positions


@dataclass
class PoseCollator:
    """Batches sequences for PoSE: fresh skips in every epoch, the same however batches are made.

    The skips of a sequence follow from `seed`, the epoch and its tokens. They do not depend on batch size, on loader
    workers, on the number of processes, or on where a run was resumed. Call `set_epoch` as each epoch begins, as for
    `torch.utils.data.DistributedSampler`; without it, every epoch repeats the first one's skips.

    The batch carries an `attention_mask` of ones. Without one, Transformers takes a jump in `position_ids` for the
    start of a packed document, and chunks would not see each other.
    """

    target_length: int
    """Tokens that the model is to read; positions stay below it."""
    pad_token_id: int = 0
    """Fills shorter sequences on the right; its positions get no attention and no loss."""
    num_chunks: int = 2
    """Runs of consecutive positions in a sequence."""
    sequence_length: int | None = None
    """Tokens of a training sequence. From longer ones chunks are taken that lie apart in the text too, as in the
    paper. `None` takes sequences as they come."""
    seed: int = 0
    _epoch: torch.Tensor = field(
        # In shared memory, so that workers that outlive an epoch see the next one's number.
        default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_(),
        init=False,
        repr=False,
        compare=False,
    )

    def set_epoch(self, epoch: int) -> None:
        """Says which pass over the data begins, for sequences that do not carry an `epoch` of their own."""
        self._epoch.fill_(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """From `input_ids` (and `labels`, `epoch`) of several sequences to one batch, `[B, T]` each."""
        rows = [self._row(feature) for feature in features]
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_token_id, "labels": -100, "position_ids": 0, "attention_mask": 0}
        return {name: torch.stack([_padded(row[name], longest, fill) for row in rows]) for name, fill in fills.items()}

    def _row(self, feature: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        ids = torch.as_tensor(feature["input_ids"])
        labels = torch.as_tensor(feature.get("labels", ids)).clone()
        length = min(len(ids), self.sequence_length or len(ids))
        identity = f"{self.seed} {int(feature.get('epoch', self._epoch))} {ids.tolist()}"
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(identity.encode()).digest()[:8], "big") >> 1)
        positions = pose_positions(length, self.target_length, self.num_chunks, generator)
        chosen = torch.arange(length)
        starts = 1 + (positions.diff() != 1).nonzero()[:, 0]
        if len(ids) > length:
            room = torch.randint(len(ids) - length + 1, (len(starts),), generator=generator).sort().values
            for start, move, before in zip(starts.tolist(), room.tolist(), [0, *room.tolist()], strict=False):
                chosen[start:] += move - before
        labels = labels[chosen]
        labels[1:][chosen.diff() != 1] = -100  # the token before it in the text is not the one before it here
        return {
            "input_ids": ids[chosen],
            "labels": labels,
            "position_ids": positions,
            "attention_mask": torch.ones(length, dtype=torch.int64),
        }


def _padded(row: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=fill)


def distance_coverage(batches: Iterable[Mapping[str, torch.Tensor]], target_length: int, bins: int = 8) -> list[float]:
    """How evenly training covered the distances that it is for.

    Args:
        batches (iterable): Batches with `position_ids` `[B, T]` and, if there is padding, `attention_mask`.
        target_length (`int`): Distances are counted from 0 up to it.
        bins (`int`): Intervals of equal width.

    Returns:
        `list[float]`: For every interval the share of pairs of query and key at such a distance; their sum is 1.
    """
    counts = torch.zeros(bins, dtype=torch.float64)
    for batch in batches:
        masks = batch.get("attention_mask", torch.ones_like(batch["position_ids"]))
        for positions, mask in zip(batch["position_ids"], masks, strict=True):
            kept = positions[mask.bool()]
            distance = kept[:, None] - kept
            # A histogram of whole numbers is exact in float64, and torch has none for integers.
            counts += torch.histc(distance[distance >= 0].double(), bins, 0, target_length)
    return (counts / counts.sum()).tolist()
