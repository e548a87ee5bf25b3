"""PoSE: positions by their definition, what a batch holds, and that chunks see each other however attended."""

from itertools import pairwise

import pytest
import torch
from conftest import strong, token_ids

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


def test_skips_are_fresh_and_yet_reproducible():
    row = [{"input_ids": list(range(64))}]
    one, other = (PoseCollator(1024, seed=3) for _ in range(2))
    first, second = one(row), one(row)
    assert not torch.equal(first["position_ids"], second["position_ids"])
    assert torch.equal(other(row)["position_ids"], first["position_ids"])
    resumed = PoseCollator(1024, seed=3, num_batches=1)
    assert torch.equal(resumed(row)["position_ids"], second["position_ids"])


def test_chunks_of_a_longer_text_lie_apart_in_it():
    """Text and positions both skip; a token whose predecessor is not there has no loss."""
    collator = PoseCollator(target_length=400, sequence_length=40, num_chunks=3)
    apart = 0
    for _ in range(50):
        batch = collator([{"input_ids": list(range(200))}])
        ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert len(ids) == 40 and ids == sorted(set(ids)) and ids[0] == 0
        for index in range(1, 40):
            follows = ids[index] == ids[index - 1] + 1
            assert follows or positions[index] > positions[index - 1] + 1 or labels[index] == -100
            assert labels[index] == (ids[index] if follows else -100) or labels[index] == -100
            apart += not follows
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
