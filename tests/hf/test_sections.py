"""Vision-language models that rotate by three axes at once: frequency methods keep their sections, spans take text."""

import pytest
import torch
import transformers
from conftest import close, token_ids

import rope_scaling
from rope_scaling import RopeScalingError


LENGTH, TRAINED = 150, 64
_TEXT = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED},
    **{"initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_SEES = {"depth": 1, "num_heads": 2, "patch_size": 4}
_NARROW = {**_SEES, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}
_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
FAMILIES = {
    "Qwen2VL": ({"mrope_section": [2, 3, 3]}, {**_SEES, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "Qwen2_5_VL": ({"mrope_section": [2, 3, 3]}, {**_NARROW, "window_size": 16, "fullatt_block_indexes": [0]}),
    "Qwen3VL": (
        {"mrope_section": [2, 3, 3], "mrope_interleaved": True},
        {**_NARROW, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "Glm4v": ({"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}, {**_NARROW, "image_size": 16}),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    sections, vision = FAMILIES[request.param]
    text = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections}}
    config = getattr(transformers, f"{request.param}Config")(text_config=text, vision_config=vision, **_TOKENS)
    torch.manual_seed(0)
    return getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()


@pytest.fixture
def axes():
    """Time, height and width of every token, `[3, 1, T]`, with an image in the middle."""
    found = torch.arange(LENGTH).repeat(3, 1, 1)
    found[0, :, 20:40] = 20
    found[1, :, 20:40] = 20 + torch.arange(20) // 5
    found[2, :, 20:40] = 20 + torch.arange(20) % 5
    return found


@torch.no_grad()
def logits(model, **given):
    return model(input_ids=token_ids(LENGTH) % 50 + 3, use_cache=False, **given).logits


def test_frequencies_keep_the_sections(model, axes, tmp_path):
    before, sections = logits(model, position_ids=axes), dict(model.config.get_text_config().rope_parameters)
    rope_scaling.patch(model, "linear", factor=2)
    assert close(logits(model, position_ids=2 * axes), before)
    rope_scaling.patch(model, "yarn", factor=4)
    after = logits(model, position_ids=axes)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(again, position_ids=axes), after) and not close(after, before)
    kept = again.config.get_text_config().rope_parameters
    assert kept["mrope_section"] == sections["mrope_section"] and kept.keys() >= sections.keys()
    assert torch.equal(logits(rope_scaling.unpatch(model), position_ids=axes), before)


@pytest.mark.parametrize("method", ["self_extend", "sliding_window"])
def test_spans_take_text_and_refuse_images(method, model, axes, tmp_path):
    before, text = logits(model), torch.arange(LENGTH).repeat(3, 1, 1)
    rope_scaling.patch(model, method, **({"window": 16} if method == "sliding_window" else {}))
    after = logits(model)
    assert torch.equal(logits(model, position_ids=text), after) and not close(after, before)
    with pytest.raises(RopeScalingError, match=r"more than one axis.*frequency method"):
        logits(model, position_ids=axes)
    model.save_pretrained(tmp_path)
    assert close(logits(rope_scaling.from_pretrained(tmp_path, type(model))), after)
    assert torch.equal(logits(rope_scaling.unpatch(model)), before)


def test_written_past_the_trained_length(model):
    rope_scaling.patch(model, "yarn", factor=4)
    ids = token_ids(TRAINED - 4) % 50 + 3
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, max_new_tokens=10, **given)
    with torch.no_grad():
        chosen = model(input_ids=written, use_cache=False).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(written[0, ids.shape[1] :], chosen)
