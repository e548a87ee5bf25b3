"""Packing: rows hold whole documents, and no document sees another, in training and under a cache."""

import pytest
import torch
from conftest import strong, token_ids
from transformers import DynamicCache

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.training import PackedCollator, document_ids, document_mask, pack_documents


def test_rows_hold_every_token_once_and_documents_whole():
    documents = [[i] * (1 + (7 * i) % 13) for i in range(1, 60)] + [list(range(100, 145))]
    rows = list(pack_documents(documents, 20))
    assert all(len(row["input_ids"]) == len(row["position_ids"]) <= 20 for row in rows)
    flat = [token for row in rows for token in row["input_ids"]]
    assert sorted(flat) == sorted(token for document in documents for token in document)
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        pieces = [row["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert all(piece in documents or piece[0] >= 100 for piece in pieces)
    # Best fit wastes little: the rows that are full make up almost all.
    assert len(rows) <= 1.1 * len(flat) / 20 + 1


def test_a_long_document_is_cut_and_nothing_else():
    rows = list(pack_documents([list(range(25)), [50, 51]], 10))
    assert [row["input_ids"] for row in rows][:2] == [list(range(10)), list(range(10, 20))]
    assert rows[2] == {"input_ids": [20, 21, 22, 23, 24, 50, 51], "position_ids": [0, 1, 2, 3, 4, 0, 1]}


def test_open_rows_are_bounded():
    rows = pack_documents(([1] * 6 for _ in range(100_000)), 10)  # never fills a row
    assert next(rows)["input_ids"] == [1] * 6


def test_a_batch():
    rows = [
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [9, 10], "position_ids": [0, 1]},
    ]
    batch = PackedCollator(pad_token_id=3)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 10, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert document_ids(batch["position_ids"]).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_skips_stay_in_their_document():
    assert document_ids(torch.tensor([[0, 1, 50, 51, 0, 1, 1]])).tolist() == [[0, 0, 0, 0, 1, 1, 2]]


@pytest.mark.parametrize("way", ["sdpa", "eager", "rerope", "sliding_window"])
@pytest.mark.parametrize("padding", [False, True])
def test_documents_are_isolated_in_training(way, padding):
    """Changing one document changes nothing in the next, and each has the logits that it has alone."""
    model = strong("llama").train()
    if way in ("sdpa", "eager"):
        model.set_attn_implementation(way)
    else:
        rope_scaling.patch(model, way, **({"window": 32} if way == "sliding_window" else {}))
    first, second = token_ids(70)[0], token_ids(90, seed=1)[0]
    rows = [{"input_ids": torch.cat([first, second]), "position_ids": torch.cat([torch.arange(70), torch.arange(90)])}]
    if padding:
        rows.append({"input_ids": token_ids(170, seed=2)[0], "position_ids": torch.arange(170)})
    batch = PackedCollator()(rows)
    del batch["labels"]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 3:60] = 9
    with torch.no_grad():
        packed, perturbed = model(**batch, use_cache=False).logits, model(**changed, use_cache=False).logits
        assert torch.equal(packed[0, 70:160], perturbed[0, 70:160])
        assert not torch.equal(packed[0, :70], perturbed[0, :70])
        for ids, part in ((first, packed[0, :70]), (second, packed[0, 70:160])):
            assert torch.allclose(model(ids[None], use_cache=False).logits[0], part, atol=1e-4)


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_documents_are_isolated_under_a_cache_by_the_mask(way):
    model = strong("llama")
    model.set_attn_implementation(way)
    ids = token_ids(60)
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    changed = ids.clone()
    changed[0, 3:20] = 9

    def run(tokens, **arguments):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            return model(tokens, position_ids=positions, **{CACHE_NAME: cache}, use_cache=True, **arguments).logits

    assert not torch.equal(run(ids)[0, 25:], run(changed)[0, 25:])  # what the mask is for
    mask = document_mask(positions)
    # The eager function adds its mask to scores.
    mask = mask if way == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    kept = run(ids, attention_mask=mask)
    assert torch.equal(kept[0, 25:], run(changed, attention_mask=mask)[0, 25:])
    with torch.no_grad():
        assert torch.allclose(model(ids[:, 25:]).logits, kept[:, 25:], atol=1e-4)


def test_bad_positions():
    with pytest.raises(RopeScalingError, match=r"must be \[B, T\]; got \(5,\)"):
        document_mask(torch.arange(5))
