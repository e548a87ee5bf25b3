"""What a recipe would do, resolved, without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rope_scaling.eval.documents import parse_lengths
from rope_scaling.recipes.config import Recipe
from rope_scaling.recipes.sequences import make_collator, training_data
from rope_scaling.recipes.train import prepare, rehearse, train_dtype, training_arguments
from rope_scaling.training import distance_coverage, statistics


def make_plan(recipe: Recipe, with_data: bool = True) -> dict[str, str]:
    """What would be trained, on what, for how long, in how much memory.

    The model is built without weights and the data are read, so everything that a run refuses is refused here.

    Args:
        recipe (`Recipe`): What would be run.
        with_data (`bool`): Read and tokenise the data. Without, their statistics are left out.

    Raises:
        RopeScalingError: as `finetune`.
    """
    arguments = training_arguments(recipe, Path("runs") / "dry-run")
    rehearsal = rehearse(recipe)
    model, tokenizer, trained, target = rehearsal.model, rehearsal.tokenizer, rehearsal.trained, rehearsal.target
    lengths = parse_lengths(recipe.evaluation.lengths, trained)
    counted = sum(one.numel() for one in model.parameters())
    trainable = prepare(recipe, model)
    learning = sum(one.numel() for one in trainable.parameters() if one.requires_grad)
    rows = arguments.per_device_train_batch_size
    dtype = train_dtype(recipe, arguments.device)
    dtype_name = str(dtype).removeprefix("torch.")
    batch = rows * arguments.gradient_accumulation_steps * max(arguments.world_size, 1)
    plan = {
        "model": f"{recipe.model}, {counted / 1e6:,.1f}M parameters",
        "patch": f"{recipe.patch.methods or 'none'}: reads {trained:,} tokens, is to read {target:,}",
        "trained": f"{learning / 1e6:,.1f}M parameters ({learning / counted:.1%}) in {dtype_name}",
        "sequences": f"{recipe.data.sequence_length:,} tokens, {recipe.data.layout}",
        "batch": f"{batch} sequences a step on {arguments.world_size} device{'s' * (arguments.world_size > 1)}",
    }
    steps = arguments.max_steps
    if with_data and not recipe.data.streaming:
        dataset = training_data(recipe, tokenizer)
        found = statistics(dataset, trained)
        plan["data"] = str(found)
        if steps < 1:
            steps = int(arguments.num_train_epochs * max(len(dataset) // batch, 1))
        seen = steps * batch / max(len(dataset), 1)
        plan["passes"] = f"{seen:.2f} over the data"
        if recipe.data.layout == "pose":
            plan["distances"] = _distances(make_collator(recipe, tokenizer, target), dataset, target)
    if steps > 0:
        plan["steps"] = f"{steps:,}, {steps * batch * recipe.data.sequence_length:,} tokens"
    plan["memory"] = _memory(recipe, model, counted, learning, rows, dtype)
    plan["evaluation"] = f"{recipe.evaluation.source} at {', '.join(map(str, lengths))} tokens"
    return plan


def _distances(collator: Any, dataset: Any, target: int) -> str:
    few = []
    for i in range(64):
        epoch, index = divmod(i, len(dataset))
        collator.set_epoch(epoch)
        few.append(collator([dataset[index]]))
    shares = distance_coverage(few, target)
    return "pairs by distance, in eighths of the target: " + " ".join(f"{share:.1%}" for share in shares)


def _memory(recipe: Recipe, model: Any, counted: int, learning: int, rows: int, dtype: torch.dtype) -> str:
    """Weights, gradients, two moments of Adam, and what a layer keeps for backward (34 bytes a token and unit of width
    without checkpointing, 2 with), plus one chunk of logits three times in float32."""
    config = model.config.get_text_config()
    size = dtype.itemsize
    tokens = rows * recipe.data.sequence_length
    kept = (2 if recipe.activation_checkpointing else 34) * tokens * config.hidden_size * config.num_hidden_layers
    logits = 12 * min(recipe.chunk_size or tokens, tokens) * config.vocab_size
    parts = {
        "weights": counted * size,
        "gradients and optimizer": learning * (size + 8),
        "activations": kept,
        "logits": logits,
    }
    each = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    return f"about {sum(parts.values()) / 2**30:.1f} GB a device unsharded ({each})"
