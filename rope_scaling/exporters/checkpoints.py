"""Checkpoints that servers read to the frequencies that the live model has: their config, in each one's own words."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.exporters.targets import (
    QUERY_SCALE,
    READ_KEYS,
    TARGETS,
    computes_otherwise,
    is_latent,
    stated_as_it_is,
    why_not_computed,
)
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.frequencies.base import longrope_parameters
from rope_scaling.hf.checkpoint import Checkpoint, read_checkpoint
from rope_scaling.hf.compat import ignored_rope_keys
from rope_scaling.hf.configs import RECORD_KEY, rope_parameters_of
from rope_scaling.hf.model_patch import Patch, applied_patch
from rope_scaling.hf.rope_types import with_static_base
from rope_scaling.hf.slot import Slot
from rope_scaling.hf.transformers_v4 import EXPORT_KEY, FULL, V4, in_older_form, is_reworded, older_keys


def config_overrides(model: nn.Module, target: str) -> dict[str, Any]:
    """The keys of `config.json` that let a server compute the frequencies of a model, patched or as loaded.

    For `--hf-overrides` of vLLM or `--json-model-override-args` of SGLang, where the weights are those of the base.

    Args:
        model (`nn.Module`): A loaded model.
        target (`str`): `transformers`, `transformers-v4`, `vllm`, `sglang` or `llama.cpp`.

    Returns:
        `dict`: plain values, as JSON takes them; those of a nested text config under its name, such as `text_config`.

    Raises:
        RopeScalingError: the target is unknown, or cannot compute what the patch does; the message names the nearest
            method that it can.
    """
    checkpoint = read_checkpoint(model)
    settings = _settings(checkpoint, applied_patch(checkpoint.slots), target)
    if FULL in settings["rope_parameters"]:
        settings.pop("rope_scaling", None)  # overriding it would replace the settings of all layer types
    path = _path_to_text_config(checkpoint)
    if target == "sglang" and len(path) > 1:
        raise RopeScalingError(
            f"SGLang overrides one level of nested configs, and the text config of this model is `{'.'.join(path)}`. "
            "Export a folder: `export(model, folder, 'sglang')`."
        )
    for name in reversed(path):
        settings = {name: settings}
    return settings


def text_overrides(checkpoint: Checkpoint, patch: Patch | None, target: str) -> dict[str, Any]:
    """As `config_overrides`, without the names of the configs that the text config is nested in, and without warnings.

    Args:
        checkpoint (`Checkpoint`): What `read_checkpoint` gave.
        patch (`Patch`, *optional*): The patch in effect on the model.
        target (`str`): As for `config_overrides`.

    Raises:
        RopeScalingError: as `config_overrides`.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    check_exportable(checkpoint, patch, target)
    config = checkpoint.config
    parameters, length = rope_parameters_of(config), getattr(config, "max_position_embeddings", None)
    if length is None:
        raise RopeScalingError(
            f"The config of {type(checkpoint.model).__name__} states no `max_position_embeddings`, up to which "
            f"{TARGETS[target]} serves a model. Patch it, with `original_max_position_embeddings` and `target_length`."
        )
    if target == "transformers":
        return _plain({"rope_parameters": parameters, "max_position_embeddings": length})
    slot = next((slot for slot in checkpoint.slots if slot.layer_type == FULL), checkpoint.slots[0])
    portable = _portable(checkpoint, slot, slot.part_of(parameters), target)
    parameters = slot.with_part(parameters, portable)
    settings = {"max_position_embeddings": length, "rope_parameters": parameters}
    settings |= older_keys(parameters, config.model_type, strict=target == V4)
    if target != V4 and slot.layer_type is None:
        # Overrides set one key after the other, and in Transformers 5 both are the same: each must be complete.
        settings["rope_scaling"] = parameters
    if target == "vllm" and QUERY_SCALE in portable and "original_max_position_embeddings" in portable:
        settings["llama_4_scaling"] = {
            "beta": portable[QUERY_SCALE],
            "original_max_position_embeddings": portable["original_max_position_embeddings"],
        }
    return _plain(settings)


def check_exportable(checkpoint: Checkpoint, patch: Patch | None, target: str) -> None:
    """Raises `RopeScalingError` for what no config tells a target."""
    if patch is not None and patch.programs:
        method = next(method for method in patch.methods if not isinstance(method, FrequencyMethod))
        raise RopeScalingError(
            f"{method.written_name!r} changes attention, and {TARGETS[target]} knows frequencies only. The nearest "
            f"that can be exported: {method.nearest_static!r} at the target length."
        )
    if not checkpoint.in_config:
        raise RopeScalingError(
            f"{type(checkpoint.model).__name__} hard-codes its rotary frequencies, so "
            f"{TARGETS[target]} cannot be configured to match. Save it with `save_pretrained`, and load it with "
            "`rope_scaling.from_pretrained`."
        )
    if target == "transformers" or not checkpoint.layer_types:
        return
    config = checkpoint.config
    if target == "llama.cpp" or not in_older_form(rope_parameters_of(config), config.model_type):
        raise RopeScalingError(
            f"The layer types of this model rotate differently, and {TARGETS[target]} has no keys for these settings. "
            "Export it to 'transformers', and serve it with vLLM's Transformers backend."
        )


def export(model: Any, folder: str | Path, target: str, tokenizer: Any = None) -> Path:
    """Writes a checkpoint for a server: weights, config, tokenizer with its new length, and how to serve it.

    Args:
        model (`nn.Module`): A loaded model, patched or not, without adapters (`merge_and_unload` first).
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
    checkpoint = read_checkpoint(model)
    patch = applied_patch(checkpoint.slots)
    settings = _settings(checkpoint, patch, target)
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
        marked = settings | ({EXPORT_KEY: V4} if target == V4 else {})
        stated = settings["rope_parameters"]
        reworded = target == V4 and FULL not in stated and is_reworded(stated, checkpoint.config.model_type)
        _write_config(staging / "config.json", _path_to_text_config(checkpoint), marked, reworded)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
            file = staging / "tokenizer_config.json"
            length = {"model_max_length": settings["max_position_embeddings"]}
            _rewrite(file, json.loads(file.read_text(encoding="utf-8")) | length)
        (staging / "README.md").write_text(_card(checkpoint, patch, target, settings), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        staging.chmod(0o755)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def _settings(checkpoint: Checkpoint, patch: Patch | None, target: str) -> dict[str, Any]:
    settings = text_overrides(checkpoint, patch, target)
    parameters = settings["rope_parameters"]
    if why := computes_otherwise(parameters.get(FULL, parameters), checkpoint.config, target):
        warnings.warn(why, stacklevel=3)
    return settings


def _portable(checkpoint: Checkpoint, slot: Slot, parameters: dict[str, Any], target: str) -> dict[str, Any]:
    """RoPE parameters that the target computes the live frequencies from."""
    parameters = with_static_base(parameters, slot.config)
    config, kind = slot.config, parameters["rope_type"]
    known = READ_KEYS | ignored_rope_keys(config)
    stated = {key: value for key, value in parameters.items() if key in known and value is not None}
    if QUERY_SCALE in stated and target == "sglang":
        raise RopeScalingError(
            "SGLang scales the queries of this model by position over `max_position_embeddings`, and Transformers by "
            "position over the trained length, so their logits differ. Export it to 'vllm'."
        )
    if stated_as_it_is(stated, target, config):
        if is_latent(config) and kind == "yarn":
            stated.pop("attention_factor", None)  # vLLM takes a stated 1 for softmax without `mscale_all_dim`
        return stated
    if kind.startswith("dynamic"):
        raise RopeScalingError(f"{kind!r} depends on the length of the call, differently in every server.")
    if target == "llama.cpp":
        raise RopeScalingError(
            f"{TARGETS[target]} knows linear, yarn with its own temperature, llama3, and another base; this patch is "
            "saved with a factor for every pair, which a GGUF file can hold and this folder cannot: give a GGUF file "
            "of the model (`--gguf`), or export the nearest, 'yarn' or 'ntk'."
        )
    lists = _factor_lists(checkpoint, slot, target)
    if not stated_as_it_is(lists, target, config):
        raise RopeScalingError(why_not_computed(kind, target, config))
    return lists


def _factor_lists(checkpoint: Checkpoint, slot: Slot, target: str) -> dict[str, Any]:
    """The live frequencies as `longrope` lists, with the attention factor under each name that is read."""
    record = checkpoint.record
    trained = None if record is None else record["original_max_position_embeddings"]
    pretrained = checkpoint.trained_at(trained).rope(slot)
    inv_freq: Any = slot.inv_freq
    inv_freq, attention_factor = inv_freq.detach().cpu(), slot.attention_factor
    if pretrained.length_dependent and record is None:
        raise RopeScalingError(
            f"This model has one set of factors for texts up to its trained length and one for longer texts, and "
            f"{TARGETS[target]} takes one of them for all. Patch it: 'longrope' with its `long_factor`, or another "
            "method, is the same for all texts and can be exported."
        )
    geometry = pretrained.geometry
    factor = slot.config.max_position_embeddings / geometry.original_max_position_embeddings
    lowered = longrope_parameters(geometry, inv_freq, attention_factor, factor)
    if target != V4:
        lowered |= {"short_mscale": attention_factor, "long_mscale": attention_factor}
    others = {key: value for key, value in pretrained.other_parameters.items() if key in READ_KEYS}
    if "partial_rotary_factor" in others and geometry.head_dim:
        # Of 'proportional', it is the share of pairs that rotate; in the lists, all do, some by 0.
        others["partial_rotary_factor"] = geometry.rotary_dim / geometry.head_dim
    return {**others, "rope_theta": geometry.rope_theta, **lowered}


def _path_to_text_config(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the configs from that of a model down to that of its rotary modules; none where they are the same."""
    text = checkpoint.config
    wanted = type(text), str(rope_parameters_of(text))

    def find(config: Any) -> tuple[str, ...] | None:
        if config is text or (type(config), str(rope_parameters_of(config))) == wanted:
            return ()
        for name, inner in vars(config).items():
            if isinstance(inner, PreTrainedConfig) and (path := find(inner)) is not None:
                return name, *path
        return None

    outer = getattr(checkpoint.model, "config", None)
    return (find(outer) if isinstance(outer, PreTrainedConfig) else None) or ()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _write_config(path: Path, path_to_text: tuple[str, ...], settings: dict[str, Any], reworded: bool) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    text = saved
    for name in path_to_text:
        text = text[name]
    text.pop(EXPORT_KEY, None)
    if reworded or text.get("rope_parameters") != settings["rope_parameters"]:
        text.pop(RECORD_KEY, None)  # it goes with the parameters it was made with
    text.update(settings)
    share = settings["rope_parameters"].get("partial_rotary_factor")
    if share is not None and "partial_rotary_factor" in text:
        text["partial_rotary_factor"] = share  # some versions of Transformers write the default of the class there
    _rewrite(path, saved)


def _rewrite(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(checkpoint: Checkpoint, patch: Patch | None, target: str, settings: dict[str, Any]) -> str:
    methods = " with ".join(map(str, patch.methods)) if patch else "frequencies as loaded"
    length = settings["max_position_embeddings"]
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
        f"# {type(checkpoint.model).__name__}, {length} tokens\n\nRotary position embedding: {methods}, written for "
        f"{TARGETS[target]} by rope-scaling.\n\n```{language}\n{commands[target]}\n```\n"
    )
