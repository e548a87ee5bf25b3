"""S2 attention against a mask written out by hand; no leak of the future; padding, packing, groups of heads."""

import pytest
import torch
from conftest import strong, token_ids

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.training import PackedCollator, s2_attention


def by_hand(query, key, value, group, mask=None):
    """Every head's mask in full: same group, not later; the second half of the heads in groups half a group later."""
    heads, length = query.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    place = torch.arange(length)
    seen = []
    for head in range(heads):
        number = (place + (0 if head < heads // 2 else group // 2)) // group
        seen.append((number[:, None] == number) & (place[:, None] >= place))
    seen = torch.stack(seen)[None]
    if mask is not None:
        seen = seen & mask | torch.eye(length, dtype=torch.bool)
    scores = (query.double() @ key.double().transpose(-1, -2)) * query.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value.double()


def inputs(length, heads=4, key_heads=2, rows=2):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, count, length, 16, generator=generator) for count in (heads, key_heads, key_heads)]


@pytest.mark.parametrize("length", [1, 7, 16, 24, 40, 61])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (9, 3), (2, 1)])
def test_against_a_full_mask(length, heads, key_heads):
    q, k, v = inputs(length, heads, key_heads)
    assert torch.allclose(s2_attention(q, k, v, 16).double(), by_hand(q, k, v, 16), atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_with_padding_and_documents(additive):
    q, k, v = inputs(40)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[0, :, :, :11] = False  # left padding
    mask[1, :, 20:, :20] = False  # two documents
    wanted = by_hand(q, k, v, 16, mask)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    found = s2_attention(q, k, v, 16, attention_mask=given).double()
    assert torch.allclose(found[0, :, 11:], wanted[0, :, 11:], atol=1e-5)
    assert torch.allclose(found[1], wanted[1], atol=1e-5)
    assert torch.isfinite(found).all()


def test_no_token_sees_the_future():
    """The published eager code rolls the sequence: its first tokens see the last ones. None may here."""
    q, k, v = (x.requires_grad_() for x in inputs(48))
    out = s2_attention(q, k, v, 16)
    for place in (0, 5, 8, 15, 16, 23, 24, 40):
        gradients = torch.autograd.grad(out[:, :, place].sum(), (k, v), retain_graph=True)
        assert all(float(gradient[:, :, place + 1 :].abs().max()) == 0 for gradient in gradients)
        assert float(gradients[1][:, :, : place + 1].abs().max()) > 0


def test_in_a_model_while_it_trains():
    model = strong("llama")
    ids = token_ids(64)
    with torch.no_grad():
        plain = model(ids).logits
        rope_scaling.use_s2_attention(model, 16)
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)  # full attention outside training
        sparse = model.train()(ids, use_cache=False).logits
        assert torch.allclose(sparse[:, :8], plain[:, :8], atol=1e-5)  # in the first half group nothing is missing
        assert float((sparse[:, 20:] - plain[:, 20:]).abs().max()) > 1e-2
        rope_scaling.remove_s2_attention(model)
        assert torch.equal(model.eval()(ids).logits, plain)
    assert "s2" not in str(model.config.to_dict())


def test_a_model_sees_no_future_and_no_other_document():
    model = rope_scaling.use_s2_attention(strong("llama"), 16).train()
    ids = token_ids(64)
    changed = ids.clone()
    changed[0, 40:] = 9
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits[:, :40], model(changed, use_cache=False).logits[:, :40])
        positions = torch.cat([torch.arange(20), torch.arange(44)])
        batch = PackedCollator()([{"input_ids": ids[0], "position_ids": positions}])
        other = batch | {"input_ids": batch["input_ids"].clone()}
        other["input_ids"][0, :20] = 9
        del batch["labels"], other["labels"]
        assert torch.equal(
            model(**batch, use_cache=False).logits[:, 20:], model(**other, use_cache=False).logits[:, 20:]
        )


def test_padded_rows_have_the_logits_that_they_have_alone():
    model = rope_scaling.use_s2_attention(strong("llama"), 16).train()
    row = token_ids(37)
    padded = torch.cat([row, torch.zeros(1, 20, dtype=torch.long)], 1)
    mask = (torch.arange(57) < 37).long()[None]
    with torch.no_grad():
        alone = model(row, use_cache=False).logits
        beside = model(padded, attention_mask=mask, use_cache=False).logits[:, :37]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_bad_input():
    q, k, v = inputs(8)
    with pytest.raises(RopeScalingError, match="`group_size` must be even"):
        s2_attention(q, k, v, 5)
    with pytest.raises(RopeScalingError, match="1 queries and 8 keys"):
        s2_attention(q[:, :, :1], k, v, 4)
    with pytest.raises(RopeScalingError, match="a single one"):
        s2_attention(q[:, :1], k[:, :1], v[:, :1], 4)
    model = strong("llama")
    with pytest.raises(RopeScalingError, match="no S2 attention"):
        rope_scaling.remove_s2_attention(model)
    rope_scaling.patch(model, "rerope")
    with pytest.raises(RopeScalingError, match="cannot be combined with a span method"):
        rope_scaling.use_s2_attention(model, 16)
    gemma = rope_scaling.use_s2_attention(strong("gemma2"), 16).train()
    with pytest.raises(RopeScalingError, match="caps its scores"):
        gemma(token_ids(20), use_cache=False)
