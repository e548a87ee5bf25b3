"""Checkpoints that servers read to the frequencies that the live model has: their config, in each one's own words."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies.base import longrope_parameters
from rope_scaling.hf.configs import config_of
from rope_scaling.hf.extend import matches
from rope_scaling.hf.older_keys import EXPORT_KEY, READ_BY_V4, V4, older_keys
from rope_scaling.hf.patch import applied_patch
from rope_scaling.hf.pretrained import RECORD_KEY, pretrained_settings, read_pretrained
from rope_scaling.hf.rope_types import with_static_base
from rope_scaling.hf.rotary import Slot, rotary_slots
from rope_scaling.hf.tables import rope_parameters_of


TARGETS = {
    "transformers": "Transformers 5",
    V4: "Transformers 4.43 or later, and 5",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
}
"""What a checkpoint can be written for; llama.cpp reads it through its own `convert_hf_to_gguf.py`."""

_NEAREST = {
    "dynamic_yarn": "yarn",
    "dynamic_ntk": "ntk",
    "dynamic_linear": "linear",
    "dynamic_longrope": "longrope",
}
_AS_THEY_ARE = {
    V4: READ_BY_V4,
    "vllm": {"default", "yarn", "llama3"},
    "sglang": {"default", "yarn", "llama3"},
    "llama.cpp": {"default", "linear", "yarn", "llama3"},
}
"""Types that a target computes as Transformers does. vLLM and SGLang stretch the length of a `linear` model by its
factor once more, and take the temperature of `longrope` from other keys."""
_PLAIN_YARN = {"rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor"}
_PLAIN_YARN |= {"original_max_position_embeddings", "partial_rotary_factor"}


def config_overrides(model: nn.Module, target: str) -> dict[str, Any]:
    """The keys of `config.json` that let a server compute the frequencies of a model, patched or as it arrived.

    For `--hf-overrides` of vLLM or `--json-model-override-args` of SGLang, where the weights are those of the base.

    Args:
        model (`nn.Module`): A loaded model.
        target (`str`): `transformers`, `transformers-v4`, `vllm`, `sglang` or `llama.cpp`.

    Returns:
        `dict`: plain values, as JSON takes them.

    Raises:
        RopeScalingError: the target is unknown, or cannot compute what the patch does; the message names the nearest
            method that it can.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    check_exportable(model, target)
    slots = rotary_slots(model)
    config = config_of(slots)
    parameters, length = rope_parameters_of(config), config.max_position_embeddings
    if target == "transformers":
        return _plain({"rope_parameters": parameters, "max_position_embeddings": length})
    parameters = _portable(slots[0], parameters, target)
    return _plain({"max_position_embeddings": length, "rope_parameters": parameters, **older_keys(parameters)})


def check_exportable(model: nn.Module, target: str) -> None:
    """Raises `RopeScalingError` for what no config tells a target."""
    slots = rotary_slots(model)
    applied = applied_patch(slots)
    if applied is not None and applied.programs:
        name = next(method.name for method in applied.methods if method.name)
        raise RopeScalingError(
            f"{name!r} changes attention, and {TARGETS[target]} knows frequencies only. The nearest that can be "
            f"exported: {_NEAREST.get(name, 'yarn')!r} at the target length."
        )
    if not slots[0].in_config:
        raise RopeScalingError(
            f"{type(model).__name__} computes its angles in its code, from no config that {TARGETS[target]} reads. "
            "Save it with `save_pretrained`, and load it with `rope_scaling.from_pretrained`."
        )
    if target != "transformers" and any(slot.layer_type for slot in slots):
        raise RopeScalingError(
            f"The layer types of this model rotate differently, which {TARGETS[target]} reads from no two configs "
            "alike. Export it to 'transformers', and serve it with vLLM's Transformers backend."
        )


def stated_as_it_is(parameters: dict[str, Any], target: str) -> bool:
    """Whether a target computes from RoPE parameters what Transformers computes."""
    kind = parameters["rope_type"]
    return kind in _AS_THEY_ARE[target] and not (kind == "yarn" and target != V4 and _unusual(parameters))


def export(model: Any, folder: str | Path, target: str, tokenizer: Any = None) -> Path:
    """Writes a checkpoint for a server: weights, config, tokenizer with its new length, and how to serve it.

    Args:
        model (`nn.Module`): A loaded model, patched or as it arrived, without adapters (`merge_and_unload` first).
        folder (`str` or `Path`): Where to; it must not exist, or be empty.
        target (`str`): As for `config_overrides`.
        tokenizer (*optional*): Saved beside it.

    Returns:
        `Path`: the folder.

    Raises:
        RopeScalingError: as `config_overrides`; or the folder holds something, or the model is wrapped. Nothing is
            left behind then.
    """
    folder = Path(folder)
    overrides = config_overrides(model, target)
    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise RopeScalingError(
            f"{type(model).__name__} does not save a whole checkpoint. Export the model inside it; an adapter is "
            "merged first: `model.merge_and_unload()`."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RopeScalingError(f"{str(folder)!r} exists and is not empty. Give a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        _write_config(staging / "config.json", overrides | ({EXPORT_KEY: V4} if target == V4 else {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
            _rewrite(staging / "tokenizer_config.json", {"model_max_length": overrides["max_position_embeddings"]})
        (staging / "README.md").write_text(_card(model, target, overrides), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        staging.chmod(0o755)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def _portable(slot: Slot, parameters: dict[str, Any], target: str) -> dict[str, Any]:
    """RoPE parameters that the target computes the live frequencies from."""
    parameters = with_static_base(parameters, slot.config)
    kind = parameters["rope_type"]
    if stated_as_it_is(parameters, target):
        return dict(parameters)
    if kind.startswith("dynamic"):
        raise RopeScalingError(f"{kind!r} depends on the length of the call, differently in every server.")
    if target == "llama.cpp":
        raise RopeScalingError(
            f"{TARGETS[target]} knows linear, yarn with its own temperature, llama3, and another base; this patch is "
            "saved with a factor for every pair, which a GGUF file can hold and this folder cannot: give a GGUF file "
            "of the model (`--gguf`), or export the nearest, 'yarn' or 'ntk'."
        )
    pretrained = read_pretrained(slot, pretrained_settings(slot.config))
    inv_freq: Any = slot.inv_freq
    inv_freq, attention_factor = inv_freq.detach().cpu(), slot.attention_factor
    if pretrained.length_dependent and matches(inv_freq, pretrained.inv_freq):
        raise RopeScalingError("This model has one set of factors for short texts and one for long ones: patch it.")
    factor = slot.config.max_position_embeddings / pretrained.geometry.original_max_position_embeddings
    lowered = longrope_parameters(pretrained.geometry, inv_freq, attention_factor, factor)
    if target != V4:
        lowered |= {"short_mscale": attention_factor, "long_mscale": attention_factor}
    kept = pretrained.other_parameters
    if pretrained.geometry.rotary_dim == pretrained.geometry.head_dim:
        kept.pop("partial_rotary_factor", None)  # a share of pairs that turn, not of dimensions that form pairs
    return {**kept, "rope_theta": pretrained.geometry.rope_theta, **lowered}


def _unusual(yarn: dict[str, Any]) -> bool:
    """Whether YaRN parameters hold more than every server reads alike."""
    factor = yarn.get("attention_factor")
    usual = 0.1 * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0
    set_keys = {key for key, value in yarn.items() if value is not None and (key, value) != ("truncate", True)}
    return bool(set_keys - _PLAIN_YARN) or (factor is not None and abs(factor - usual) > 1e-6)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _write_config(path: Path, overrides: dict[str, Any]) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.pop(EXPORT_KEY, None)
    if saved.get("rope_parameters") != overrides["rope_parameters"]:
        saved.pop(RECORD_KEY, None)  # it goes with the parameters it was made with
    _rewrite(path, overrides, saved)


def _rewrite(path: Path, changes: dict[str, Any], values: dict[str, Any] | None = None) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if values is None else values
    path.write_text(json.dumps(values | changes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(model: Any, target: str, overrides: dict[str, Any]) -> str:
    applied = applied_patch(rotary_slots(model))
    methods = " with ".join(str(method) for method in applied.methods) if applied else "frequencies as they arrived"
    length = overrides["max_position_embeddings"]
    commands = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        V4: 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "vllm": f"vllm serve THIS_FOLDER --max-model-len {length}",
        "sglang": f"python -m sglang.launch_server --model-path THIS_FOLDER --context-length {length}",
        "llama.cpp": (
            f"python convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf\nllama-server -m model.gguf -c {length}"
        ),
    }
    language = "python" if target.startswith("transformers") else "bash"
    if target == V4:
        commands[target] += "\n# to change it and save it again with the keys of both: rope_scaling.from_pretrained"
    return (
        f"# {type(model).__name__}, {length} tokens\n\nRotary position embedding: {methods}, written for "
        f"{TARGETS[target]} by rope-scaling.\n\n```{language}\n{commands[target]}\n```\n"
    )
