"""Every language model of the installed Transformers that rotates queries and keys, as a tiny random model, and
whether patches do to it what they should. `python tests/families.py` writes `docs/families.md`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

import rope_scaling
from rope_scaling import RopeScalingError, SelfExtend, SlidingWindow, Span, SpanMethod


ENCODERS = {model_type: name for model_type, name in MASKED.items() if model_type not in DECODERS}
NAMES = {**DECODERS, **ENCODERS}
TRAINED = 64
LENGTH = 150
WINDOW = 8
_SMALL = {
    **dict.fromkeys(("vocab_size", "hidden_size", "d_model", "n_embd", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("unpadded_vocab_size",), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), TRAINED),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 48),
    **{"eos_token_id": None, "pad_token_id": 0},
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_OWN = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "codegen": {"n_ctx": 512, "n_positions": 512},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"per_layer_config": {"1": {"head_dim": 32}}},
    "gemma4_unified_text": {"per_layer_config": {"1": {"head_dim": 32}}},
    "gptj": {"n_positions": 512},
    "granitemoehybrid": {
        **{"position_embedding_type": "rope", "layer_types": ["linear_attention", "full_attention"]},
        **{key: value for key, value in _MAMBA.items() if key != "mamba_chunk_size"},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 24},
    "nemotron": {"head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roformer": {"max_position_embeddings": 512, "is_decoder": True},
    "youtu": {"tie_word_embeddings": False},
    "zamba2": {"use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family wants besides, to be small and to have a layer of every kind."""
_LARGE = {
    "blt": "four configs of different widths inside one",
    "phi4_multimodal": "vision and audio parts of fixed size",
}
_TABLES = {"codegen", "gptj"}
"""They read no further than their table of angles, so it is longer here, and what acts on far keys begins earlier."""
_STATELESS = {"recurrent_gemma"}
"""No trained length in the config; it is passed."""


class Halved(SpanMethod):
    """All distances count half, in two spans that meet at 20 tokens; `linear` with factor 2 does the same."""

    name = "halved"

    def spans(self, rope):
        angles = {"query": rope.positions(lambda m: m / 2), "key": rope.positions(lambda n: n / 2)}
        near = Span(first=lambda m: (m - 19).clamp(min=0), last=lambda m: m, **angles)
        far = Span(first=lambda m: m * 0, last=lambda m: m - 20, **angles)
        return [near, far]


@cache
def families():
    """Model types whose modelling code rotates queries and keys; those that only wrap another one are left out."""
    found = []
    for model_type, name in NAMES.items():
        source = inspect.getsource(importlib.import_module(_model_class(name).__module__))
        inner = _DEFAULTS.get(model_type)
        if inner is None and model_type in CONFIG_MAPPING:
            try:
                inner = CONFIG_MAPPING[model_type]().get_text_config().model_type
            except Exception:
                inner = model_type
        if re.search("rotary|freqs_cis", source, flags=re.IGNORECASE) and (inner == model_type or inner not in NAMES):
            found.append(model_type)
    return found


_DEFAULTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}


def _model_class(name):
    return getattr(transformers, name)


def make(model_type):
    """A tiny random model, float32, whose attention matters; the same every time."""
    text = CONFIG_MAPPING[model_type]().get_text_config()
    values, taken = text.to_dict(), set(inspect.signature(type(text)).parameters)
    changes = {k: v for k, v in _SMALL.items() if k in taken and (values.get(k) is None or type(values[k]) is int)}
    if "kv_lora_rank" in values:
        changes |= {"num_key_value_heads": 4} if "num_key_value_heads" in taken else {}
        changes.pop("head_dim", None)
    if values.get("sliding_window") is None:
        changes.pop("sliding_window", None)
    count = values.get("num_hidden_layers") or 0
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == count > 2}
    if lists:
        kinds = {}
        for index in range(count):
            kinds.setdefault(str([v[index] for v in lists.values()]), index)
        kept = sorted(kinds.values())[:6] if len(kinds) > 1 else [0, 1]
        changes |= {k: [v[index] for index in kept] for k, v in lists.items()} | {"num_hidden_layers": len(kept)}
    if values.get("rope_parameters"):
        changes["rope_parameters"] = _small_rope(values["rope_parameters"])
    torch.manual_seed(0)
    config = type(text)(**copy.deepcopy(changes | _OWN.get(model_type, {})))
    model = _model_class(NAMES[model_type])(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # a table of sines and cosines
            if parameter.dim() >= 2:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            elif parameter.numel() > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _small_rope(parameters):
    if "rope_theta" not in parameters and any(isinstance(part, dict) for part in parameters.values()):
        return {k: _small_rope(part) if isinstance(part, dict) else part for k, part in parameters.items()}
    small = dict(parameters)
    if small.get("original_max_position_embeddings"):
        small |= {"original_max_position_embeddings": TRAINED // 2, "factor": 2.0}
    if "mrope_section" in small:
        pairs = int(8 * small.get("partial_rotary_factor", 1.0))
        parts = [part * pairs // sum(small["mrope_section"]) for part in small["mrope_section"]]
        small["mrope_section"] = [*parts[:-1], pairs - sum(parts[:-1])]
    return small


def tokens(seed=1, length=LENGTH):
    """Random token ids, `[1, length]`."""
    return torch.randint(2, 60, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids=None):
    """Logits past the trained length, `[T, V]`."""
    return model(input_ids=tokens() if ids is None else ids).logits[0].float()


def alike(one, other):
    """Whether logits agree to float32 rounding, on the scale of all of them."""
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def patch(model, *method, **arguments):
    """Patches, passing a trained length to a family that has none."""
    if model.config.model_type in _STATELESS:
        arguments["original_max_position_embeddings"] = TRAINED
    if model.config.model_type in _TABLES and "factor" not in arguments:
        arguments["target_length"] = 1024
    return rope_scaling.patch(model, *method, **arguments)


def settings(model):
    """A model's config, but for what saving it writes there."""
    values = copy.deepcopy(model.config.to_dict())
    return {key: value for key, value in values.items() if key not in ("architectures", "dtype")}


def check(model_type):
    """What frequency methods, distance maps and windows do on a family: `works`, or `refused: ...`, by name.

    Raises:
        AssertionError: something else than it should, in silence.
        NotConstructibleError: no tiny model could be built or run.
    """
    if model_type in _LARGE:
        raise NotConstructibleError(_LARGE[model_type])
    try:
        model = make(model_type)
        before = logits(model)
    except Exception as error:
        raise NotConstructibleError(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
    assert before.isfinite().all()
    config = settings(model)
    steady = _generates(model)
    found = {}
    for name, one in (("frequencies", _frequencies), ("distances", _distances), ("windows", _windows)):
        try:
            one(model, before, steady)
            found[name] = "works"
        except RopeScalingError as error:
            found[name] = "refused: " + " ".join(str(error).split())
        assert torch.equal(logits(model), before), "unpatch"
        assert settings(model) == config, "unpatch leaves something in the config"
    return found


class NotConstructibleError(Exception):
    """No tiny model could be built or run."""


def _frequencies(model, before, steady):
    patch(model, "yarn", factor=4)
    try:
        after = logits(model)
        assert not alike(after, before), "nothing changed"
        assert _generates(model) or not steady, "the cache changes the answer"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            assert alike(logits(_loaded(model, folder)), after), "saved and loaded"
    finally:
        rope_scaling.unpatch(model)


def _loaded(model, folder, refused=False):
    """By plain Transformers, unless it refuses with the line that loads it, as it may or must."""
    try:
        loaded = type(model).from_pretrained(folder).eval()
    except Exception as error:
        if "load it with rope_scaling.from_pretrained(folder)" not in str(error):
            raise
        return rope_scaling.from_pretrained(folder, type(model))
    assert not refused, "plain Transformers loads it as if it were not patched"
    return loaded


def _distances(model, before, steady):
    patch(model, SelfExtend(window=TRAINED // 2))
    try:
        after = logits(model)
        assert not alike(after, before), "nothing changed"
        assert _generates(model) or not steady, "the cache changes the answer"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            assert alike(logits(_loaded(model, folder, refused=True)), after), "saved and loaded"
    finally:
        rope_scaling.unpatch(model)
    patch(model, Halved())
    halved = logits(model)
    rope_scaling.unpatch(model)
    try:
        patch(model, "linear", factor=2)
    except RopeScalingError:
        return  # no config expresses it, so there is nothing to compare with
    scaled = logits(model)
    rope_scaling.unpatch(model)
    assert alike(halved, scaled), "half the distances are half the frequencies"


def _windows(model, before, steady):
    patch(model, SlidingWindow(window=WINDOW))
    try:
        after = logits(model)
        assert not alike(after, before), "nothing changed"
        assert _generates(model) or not steady, "the cache changes the answer"
        decoder = next(m for m in model.modules() if getattr(m, "_forward_pre_hooks", None))
        program = next(hook.program for hook in decoder._forward_pre_hooks.values() if hasattr(hook, "program"))
        if model.config.model_type in ENCODERS:
            return _both_sides(model, after)
        layers = getattr(model.config, "num_hidden_layers", 2)
        if not (program.without_attention or _recurs(model)):
            ids = tokens()
            ids[0, 10] = (ids[0, 10] + 1) % 60
            last = 10 + layers * (WINDOW - 1)
            if all(layer.scaled for layer in program.layers):
                assert alike(logits(model, ids)[last + 1 :], after[last + 1 :]), "a key beyond every window is seen"
            assert not alike(logits(model, ids)[10 : 10 + WINDOW], after[10 : 10 + WINDOW])
    finally:
        rope_scaling.unpatch(model)


def _both_sides(model, after):
    """A token in the middle changes those that windows cover, before and after it, and no others."""
    ids, middle = tokens(), LENGTH // 2
    ids[0, middle] = (ids[0, middle] + 1) % 60
    changed, distance = logits(model, ids), model.config.num_hidden_layers * (WINDOW - 1)
    assert distance < middle - 1
    for beyond in (slice(0, middle - distance), slice(middle + distance + 1, None)):
        assert alike(changed[beyond], after[beyond]), "a token beyond every window is seen"
    for within in (slice(middle - WINDOW + 1, middle), slice(middle + 1, middle + WINDOW)):
        assert not alike(changed[within], after[within]), "the window looks one way only"


def _recurs(model):
    return any(re.search("mamba|recurrent|conv|rwkv|deltanet", type(m).__name__, re.I) for m in model.modules())


@torch.no_grad()
def _generates(model):
    """Whether greedy generation, from within to beyond the trained length, chooses what one call would."""
    if model.config.model_type in ENCODERS:
        return False
    ids = tokens(2, TRAINED - 4)
    config = transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert written.shape[1] == TRAINED + 6
    rows = logits(model, written)[ids.shape[1] - 1 : -1]
    chosen = rows.gather(1, written[0, ids.shape[1] :, None])[:, 0]
    return bool((rows.max(-1).values - chosen).max() <= 1e-3 * rows.abs().max())


def line(model_type):
    """A family's line of the table."""
    name = f"`{model_type}`"
    try:
        found = check(model_type)
    except NotConstructibleError as error:
        return f"| {name} | not constructible | | | {error} |"
    cells = [value.partition(":")[0] for value in found.values()]
    reasons = dict.fromkeys(value.partition(": ")[2] for value in found.values() if ": " in value)
    return f"| {name} | {' | '.join(cells)} | {' '.join(reasons)} |"


HEAD = """\
# Families

Every causal or masked language model of Transformers {version} whose code has rotary embeddings, as a tiny random
model of its own config class. `python tests/families.py` makes this table, and the tests hold every line to it.
*Works* means, for

- **frequencies** (YaRN): logits past the trained length change, and a plain reload of the saved folder gives the same
  (GPT-J and CodeGen read no frequencies from a config: a plain reload fails and names this library's, which does;
  their tables, and RoFormer's, are in the precision of the model);
- **distances** (Self-Extend): the same with this library's reload; and all distances halved, in two spans, are what
  the model computes at half of all frequencies;
- **windows**: keys beyond them change nothing;

and for all three that greedy generation with the family's own cache, across the trained length, chooses what one call
over everything would (if it does without a patch), and that `unpatch` brings the old logits back bit for bit.
*Refused* is an error that leaves the model as it was. Layers that have a window of their own keep it.

{counts}

| family | frequencies | distances | windows | reason |
| --- | --- | --- | --- | --- |
"""


def main():
    """Writes the table."""
    torch.set_num_threads(1)  # or sums of experts may differ in the last bit
    lines = {}
    for model_type in families():
        lines[model_type] = line(model_type)
        print(lines[model_type], flush=True)
    said = [
        _count([lines[one] for one in lines if one in names], kind)
        for names, kind in ((DECODERS, "causal language models"), (ENCODERS, "encoders"))
    ]
    text = HEAD.format(version=transformers.__version__, counts="\n".join(said))
    Path(__file__).parents[1].joinpath("docs", "families.md").write_text(text + "\n".join(lines.values()) + "\n")


def _count(lines, kind):
    built = [one for one in lines if "not constructible" not in one and "has no rotary" not in one]
    counts = [sum(one.split("|")[column].strip() == "works" for one in built) for column in (2, 3, 4)]
    names = ("frequencies", "distances", "windows")
    said = ", ".join(f"{name} on {count}" for name, count in zip(names, counts, strict=True))
    return f"Of {len(built)} {kind} with RoPE that could be built: {said}."


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    main()
