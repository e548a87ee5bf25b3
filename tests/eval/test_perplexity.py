"""One chunked pass measures every length exactly."""

import numpy as np
import pytest
import torch
from conftest import TRAINED_LENGTH, make_model, token_ids
from torch.nn.functional import cross_entropy

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.eval.scoring.nll import check_static, cropped_nll_curve, nll_curve


@torch.no_grad()
def direct(model, ids):
    """The losses of one plain forward call with all logits at once."""
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 199, 200, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_give_what_one_call_gives(family, chunk_size):
    model, ids = make_model(family), token_ids(200)
    curve = nll_curve(model, ids, chunk_size)
    assert curve.shape == (1, 199) and curve.dtype == torch.float32
    assert torch.allclose(curve.double(), direct(model, ids), atol=1e-4)


def test_the_longest_pass_holds_every_shorter_one():
    model = rope_scaling.patch(make_model("llama"), "yarn", factor=4)
    ids = token_ids(256)
    whole = nll_curve(model, ids, 100)
    for length in (32, 64, 128):
        assert torch.allclose(nll_curve(model, ids[:, :length], 50), whole[:, : length - 1], atol=1e-5)


def test_rows_of_a_batch_do_not_meet():
    model, ids = make_model("llama"), token_ids(100, rows=3)
    together = nll_curve(model, ids, 64)
    apart = torch.cat([nll_curve(model, row[None], 64) for row in ids])
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.parametrize("length", [65, 96, 97, 200, 256])
@pytest.mark.parametrize("chunk_size", [16, 256])
def test_cropping_gives_every_token_half_to_all_of_the_trained_length(length, chunk_size):
    model, (ids,) = make_model("llama"), token_ids(length)
    plain = nll_curve(model, ids[None], 64)[0]
    cropped = cropped_nll_curve(model, ids, plain, TRAINED_LENGTH, chunk_size)
    half = TRAINED_LENGTH // 2
    for token in range(1, length):
        if token < TRAINED_LENGTH:
            assert cropped[token - 1] == plain[token - 1]
            continue
        start = token // half * half - half
        window = torch.cat([ids[:1], ids[start + 1 : token + 1]])
        assert half <= len(window) - 1 < TRAINED_LENGTH
        assert cropped[token - 1].item() == pytest.approx(direct(model, window[None])[0, -1].item(), abs=1e-4)


def test_bfloat16_logits_are_scored_in_float32():
    model = make_model("llama").to(torch.bfloat16)
    ids = token_ids(100)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    assert np.allclose(nll_curve(model, ids, 1000)[0], cross_entropy(logits, ids[0, 1:], reduction="none"), atol=1e-6)


def test_memory_is_that_of_a_chunk():
    """The largest tensor that the pass makes holds the logits of one chunk, not of the document."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    model = make_model("llama", vocab_size=4096)
    with Watch():
        nll_curve(model, token_ids(1024), 64)
    assert largest <= max(64 * 4096, 64 * 1024 * 4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_frequencies_that_follow_the_length_are_refused(rope):
    with pytest.raises(
        RopeScalingError, match=f"{rope['rope_type']}.*changes its frequencies with the length of the call"
    ):
        check_static(make_model("llama", rope_parameters=rope))


def test_equal_longrope_lists_are_static():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [2.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    check_static(make_model("llama", rope_parameters=rope))
