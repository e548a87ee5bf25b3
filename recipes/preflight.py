"""What would make a run train something else than its recipe says, refused before anything is loaded twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.configs import rope_parameters_of, windows_of
from rope_scaling.recipes.config import Recipe


def check_recipe(recipe: Recipe) -> None:
    """What a recipe alone can tell.

    Raises:
        RopeScalingError: with the reason, and what to do.
    """
    data, extent = recipe.data, recipe.patch
    shards = [name for name in ("cp_size", "sp_size") if recipe.parallelism.get(name, 1) > 1]
    if data.layout == "packed" and shards:
        raise RopeScalingError(
            f"`data.layout=packed` cannot go with `parallelism.{shards[0]}`: it drops the mask between documents, "
            "so they would attend to one another. Give `data.layout=plain`."
        )
    for name in ("factor", "target_length", "original_max_position_embeddings"):
        if getattr(extent, name) is not None and extent.method is None:
            raise RopeScalingError(f"`patch.{name}` goes with `patch.method`. Give a method, or leave it out.")
    if data.layout != "pose" and data.text_length is not None:
        raise RopeScalingError("`data.text_length` is for `data.layout=pose`.")
    if data.text_length is not None and data.text_length < data.sequence_length:
        raise RopeScalingError(
            f"`data.text_length` {data.text_length} is less than `data.sequence_length` {data.sequence_length}."
        )
    one_text = data.source == "python-reference" or Path(data.source).exists()
    if recipe.evaluation.source == data.source and (one_text or recipe.evaluation.split == data.split):
        raise RopeScalingError(
            f"`evaluation.source` is what is trained on ({data.source!r}, split {data.split!r}): its losses would say "
            "what the model remembers. Give another source or split."
        )
    if (data.short_share > 0) != (data.short_length is not None):
        raise RopeScalingError("`data.short_share` and `data.short_length` go together.")
    if data.short_share and data.layout == "pose":
        raise RopeScalingError("All sequences of `data.layout=pose` are short. Leave `data.short_share` out.")
    if recipe.s2_group_size is not None and recipe.s2_group_size >= data.sequence_length:
        raise RopeScalingError(
            f"`s2_group_size` {recipe.s2_group_size} holds a whole sequence of {data.sequence_length} tokens, so "
            "nothing would be sparse. The paper takes a quarter of the sequence."
        )
    if data.streaming and recipe.training.get("max_steps", -1) < 1:
        raise RopeScalingError("A stream has no known length: give `training.max_steps`.")


def check_patched(recipe: Recipe, model: Any, tokenizer: Any, target_length: int, in_attention: bool) -> None:
    """What shows on the patched model.

    Args:
        recipe (`Recipe`): The run.
        model: Patched as the recipe says.
        tokenizer: That of the run.
        target_length (`int`): Tokens that the model is to read.
        in_attention (`bool`): Whether the patch has a span method or a temperature.

    Raises:
        RopeScalingError: with the reason, and what to do.
    """
    config = model.config.get_text_config()
    shards = [name for name in ("cp_size", "sp_size") if recipe.parallelism.get(name, 1) > 1]
    if shards and in_attention:
        raise RopeScalingError(
            f"`patch.method={recipe.patch.methods}` decides what attention computes, and so does "
            f"`parallelism.{shards[0]}`. Train with a frequency method."
        )
    parameters = rope_parameters_of(config) or {}
    varying = "dynamic" in str(parameters) or parameters.get("short_factor") != parameters.get("long_factor")
    if shards and varying:
        raise RopeScalingError(
            f"This model's frequencies depend on the length of the call, so with `parallelism.{shards[0]}` every "
            "rank would compute its own. Patch it with a static method."
        )
    longest = recipe.data.sequence_length
    if longest > target_length:
        raise RopeScalingError(
            f"`data.sequence_length` is {longest}, and the model is to read {target_length} tokens: training would "
            "leave its target. Give shorter sequences, or a larger `patch.factor`."
        )
    _check_window(recipe, config, target_length, in_attention)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise RopeScalingError(
            f"The tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows: they do not belong "
            "together. Give the model's own `tokenizer`."
        )
    _check_tying(recipe, config)


def check_sharded(recipe: Recipe, fsdp: bool) -> None:
    """Refuses the chunked loss under FSDP where the head, computed once more in backward, would find no weights.

    Raises:
        RopeScalingError: torch is older than 2.13.
    """
    if fsdp and recipe.chunk_size is not None and TorchVersion(torch.__version__) < "2.13":
        raise RopeScalingError(
            f"The chunked loss does not work under FSDP with torch {torch.__version__}. Update to 2.13, or give "
            "`chunk_size=null`."
        )


def _check_window(recipe: Recipe, config: Any, target_length: int, in_attention: bool) -> None:
    window = max((window or target_length for window in windows_of(config)), default=target_length)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    windowed = window < target_length and kinds == {"sliding_attention"} and not in_attention
    if windowed and recipe.patch.sliding_window is None:
        raise RopeScalingError(
            f"Every layer of this model sees the last {window} tokens only, and it is to read {target_length}. "
            "Say what is meant: `patch.sliding_window=target` widens the window, `keep` leaves it."
        )


def _check_tying(recipe: Recipe, config: Any) -> None:
    saved = set(recipe.lora.modules_to_save or ()) if recipe.lora else set()
    one_side = len(saved & {"embed_tokens", "lm_head"}) == 1
    tied = recipe.lora and one_side and getattr(config, "tie_word_embeddings", False)
    if recipe.lora and tied and not recipe.lora.ensure_weight_tying:
        raise RopeScalingError(
            "This model's head shares the embedding's weights, and `lora.modules_to_save` trains one of the two: "
            "they would part. Give `lora.ensure_weight_tying=true`."
        )
