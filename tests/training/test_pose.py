"""PoSE: positions by their definition, what a batch holds, and that chunks see each other however attended."""

from itertools import pairwise

import pytest
import torch
from conftest import strong, token_ids
from torch.utils.data import DataLoader

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.training import PoseCollator, distance_coverage, pose_positions


def chunks(positions):
    """Runs of consecutive positions, as lists."""
    runs = [[positions[0]]]
    for before, position in pairwise(positions):
        if position == before + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5])
def test_positions(num_chunks):
    generator = torch.Generator().manual_seed(0)
    seen, starts = set(), set()
    for _ in range(300):
        positions = pose_positions(20, 100, num_chunks, generator).tolist()
        assert positions[0] == 0 and positions == sorted(set(positions)) and positions[-1] < 100
        assert len(chunks(positions)) <= num_chunks
        seen.add(len(chunks(positions)))
        starts.add(chunks(positions)[-1][0] if num_chunks > 1 else 0)
    assert max(seen) == num_chunks
    assert num_chunks == 1 or len(starts) > 50


def test_two_chunks_are_those_of_the_paper():
    """The second chunk is moved by a uniform number from 0 to the target less the sequence."""
    generator = torch.Generator().manual_seed(1)
    moves = torch.tensor([int(pose_positions(64, 256, 2, generator)[-1]) - 63 for _ in range(4000)])
    assert moves.min() == 0 and moves.max() == 192
    assert abs(float(moves.double().mean()) - 96) < 4
    assert abs(float(moves.double().std()) - 193 / 12**0.5) < 2


@pytest.mark.parametrize(("length", "target", "num_chunks"), [(1, 1, 2), (1, 9, 2), (8, 8, 3), (3, 50, 9)])
def test_edges(length, target, num_chunks):
    positions = pose_positions(length, target, num_chunks)
    assert len(positions) == length and int(positions[-1]) < target


def test_a_sequence_longer_than_the_target():
    with pytest.raises(RopeScalingError, match="9 tokens does not fit in `target_length` 8"):
        pose_positions(9, 8)


def test_a_batch_pads_and_masks():
    collator = PoseCollator(target_length=100, pad_token_id=7)
    batch = collator([{"input_ids": list(range(10, 30))}, {"input_ids": [1, 2, 3]}])
    assert batch["attention_mask"].tolist() == [[1] * 20, [1] * 3 + [0] * 17]
    assert batch["input_ids"][1].tolist() == [1, 2, 3] + [7] * 17
    assert batch["labels"][1].tolist() == [1, 2, 3] + [-100] * 17
    assert batch["labels"][0].tolist() == list(range(10, 30))  # nothing was skipped in the text


ROWS = [{"input_ids": list(range(index, index + 64))} for index in range(12)]


def positions_of(collator, num_workers, epochs=(0, 1), persistent=False, batch_size=2):
    """Positions of every row of `ROWS`, epoch by epoch, as a data loader with that many workers gives them."""
    loader = DataLoader(
        ROWS,
        batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
    )
    found = []
    for epoch in epochs:
        collator.set_epoch(epoch)
        found.append(torch.cat([batch["position_ids"] for batch in loader]))
    return found


def test_skips_are_fresh_and_yet_reproducible():
    first, second = positions_of(PoseCollator(1024, seed=3), 0)
    assert (first != second).any(dim=1).all()  # no row repeats its skips in another epoch
    assert len({tuple(row) for row in first.tolist()}) == len(ROWS)  # nor those of another row
    assert (positions_of(PoseCollator(1024, seed=4), 0)[0] != first).any(dim=1).all()
    # A resumed run begins with another epoch, other batches and another process.
    assert torch.equal(positions_of(PoseCollator(1024, seed=3), 0, epochs=[1], batch_size=5)[0], second)


@pytest.mark.parametrize("persistent", [False, True])
def test_skips_do_not_depend_on_loader_workers(persistent):
    alone = positions_of(PoseCollator(1024, seed=3), 0)
    shared = positions_of(PoseCollator(1024, seed=3), 2, persistent=persistent)
    assert all(map(torch.equal, alone, shared))


def test_a_row_may_carry_its_epoch():
    collator = PoseCollator(1024, seed=3)
    (second,) = positions_of(collator, 0, epochs=[1])
    collator.set_epoch(5)
    assert torch.equal(collator([{**ROWS[7], "epoch": 1}])["position_ids"][0], second[7])


def test_chunks_of_a_longer_text_lie_apart_in_it():
    """Text and positions both skip; a token whose predecessor is not there has no loss."""
    collator = PoseCollator(target_length=400, sequence_length=40, num_chunks=3)
    apart = 0
    for epoch in range(50):
        collator.set_epoch(epoch)
        batch = collator([{"input_ids": list(range(200))}])
        ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert len(ids) == 40 and ids == sorted(set(ids)) and ids[0] == labels[0] == 0
        starts = {index for index in range(1, 40) if positions[index] > positions[index - 1] + 1}
        skips = {index for index in range(1, 40) if ids[index] != ids[index - 1] + 1}
        assert skips <= starts  # the text is cut only where positions are
        assert labels == [-100 if index in skips else ids[index] for index in range(40)]
        apart += len(skips)
    assert apart > 50


@pytest.mark.parametrize("way", ["sdpa", "eager", "engine"])
def test_the_second_chunk_sees_the_first(way):
    """Perturbing the first chunk changes the second's logits, which a packed mask would prevent."""
    model = strong("llama")
    if way == "engine":
        rope_scaling.patch(model, "rerope", target_length=256)
    else:
        model.set_attn_implementation(way)
    batch = PoseCollator(target_length=256, seed=1)([{"input_ids": token_ids(40)[0].tolist()}])
    start = 1 + int((batch["position_ids"][0].diff() != 1).nonzero()[0])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 1] = 5
    with torch.no_grad():
        difference = model(**inputs, use_cache=False).logits - model(**changed, use_cache=False).logits
        assert float(difference[0, start:].abs().max()) > 1e-3
        if way != "engine":  # the trap: without the mask of ones they are cut apart
            del inputs["attention_mask"], changed["attention_mask"]
            difference = model(**inputs, use_cache=False).logits - model(**changed, use_cache=False).logits
            assert float(difference[0, start:].abs().max()) == 0


def test_distances_covered():
    """By hand: positions 0, 1, 10 have distances 0, 0, 0, 1, 9, 10."""
    batch = {"position_ids": torch.tensor([[0, 1, 10, 3]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert distance_coverage([batch], 12, bins=3) == pytest.approx([4 / 6, 0, 2 / 6])
