"""Fine-tunes a model to a longer context: config, model, patch, data, Trainer, save, evaluate.

    rope-scaling finetune demo_yarn
    accelerate launch -m rope_scaling.recipes.train --config demo_yarn

Read from `finetune` down.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.documents import parse_lengths
from rope_scaling.eval.methods import parse_method
from rope_scaling.eval.rows import frequencies_sha256
from rope_scaling.hf.adapters import load_adapter, record_adapter
from rope_scaling.hf.chunked_loss import remove_chunked_loss, use_chunked_loss
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.loading import from_pretrained, load_config, load_model, load_tokenizer
from rope_scaling.hf.patch import patch, patch_record, patched_in_attention
from rope_scaling.hf.s2 import remove_s2_attention, use_s2_attention
from rope_scaling.recipes import card
from rope_scaling.recipes.callbacks import (
    PositionLosses,
    StopOnInterrupt,
    WholeCheckpoints,
    last_checkpoint,
    memory_gb,
)
from rope_scaling.recipes.config import Recipe, read_recipe
from rope_scaling.recipes.measure import Measured
from rope_scaling.recipes.preflight import check_patched, check_recipe
from rope_scaling.recipes.sequences import evaluation_documents, make_collator, training_data
from rope_scaling.training import PoseCollator


def finetune(recipe: Recipe, name: str, output_dir: Path, resume: bool = False) -> list[dict[str, Any]]:
    """Runs a recipe, and leaves the model, its card and its rows in a folder.

    Args:
        recipe (`Recipe`): What to run.
        name (`str`): What to call it in rows and card.
        output_dir (`Path`): New or empty, unless a run is resumed.
        resume (`bool`): Go on from the newest whole checkpoint in `output_dir`.

    Returns:
        Rows: losses by position of the unpatched model, before training, and after.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    check_recipe(recipe)
    check_folder(output_dir, resume)
    arguments = training_arguments(recipe, output_dir)
    set_seed(arguments.seed)
    main_process = arguments.process_index == 0

    # The model as it arrives, then patched; its losses either way.
    model, tokenizer = load(recipe, arguments.device)
    trained = reach(model)
    lengths = parse_lengths(recipe.evaluation.lengths, trained)
    documents = evaluation_documents(recipe, tokenizer, lengths)
    measured = Measured(recipe, name, documents, lengths, trained, output_dir)
    if main_process:
        measured.take("unpatched", model)
    target = apply_patch(recipe, model)
    check_patched(recipe, model, tokenizer, target, patched_in_attention(model))
    if main_process:
        measured.take("before", model)

    # What is trained, and on what.
    saved_dtype = model.dtype
    trainable = prepare(recipe, model.to(getattr(torch, recipe.train_dtype)))
    dataset = training_data(recipe, tokenizer)
    collator = make_collator(recipe, tokenizer, target)
    facts = run_facts(recipe, model, dataset)
    trainer = LongContextTrainer(trainable, arguments, train_dataset=dataset, data_collator=collator)
    trainer.add_callback(WholeCheckpoints(trainer, facts))
    if every := recipe.evaluation.every:
        few, size = documents.items[:2], recipe.evaluation.chunk_size
        trainer.add_callback(PositionLosses(trainer, few, lengths, trained, every, size))

    # Training.
    checkpoint = last_checkpoint(output_dir, facts) if resume else None
    if checkpoint is not None and isinstance(collator, PoseCollator) and not recipe.data.streaming:
        collator.num_batches = int(checkpoint.name.rpartition("-")[2]) * arguments.gradient_accumulation_steps
    minutes = train(trainer, checkpoint)

    # The result, measured as its users will load it.
    finish(recipe, trainer, tokenizer, saved_dtype, target)
    if not main_process:
        return []
    measured.take("after", reload(recipe, output_dir).to(arguments.device))
    state = trainer.state
    rows = measured.rows(
        {
            **facts,
            "trained_tokens": int(state.num_input_tokens_seen),
            "steps": state.global_step,
            "minutes": round(minutes, 2),
            "target_length": target,
        }
    )
    card.write(recipe, name, rows, output_dir)
    return rows


def train(trainer: Trainer, checkpoint: Path | None) -> float:
    """Trains to the end, and returns the minutes it took.

    Raises:
        RopeScalingError: the disk is full, or Ctrl-C stopped the run after saving.
    """
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OSError as error:
        raise RopeScalingError(
            f"Saving failed at step {trainer.state.global_step}: {error}. The last whole checkpoint is untouched; "
            "make room and add `--resume`."
        ) from error
    if interrupt.asked and trainer.state.global_step < trainer.state.max_steps:
        raise RopeScalingError(
            f"Stopped and saved at step {trainer.state.global_step} of {trainer.state.max_steps}. The same command "
            "with `--resume` goes on."
        )
    return (time.monotonic() - started) / 60


class LongContextTrainer(Trainer):
    """Stops at a loss that is not finite, and logs memory."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss).all()):
            raise RopeScalingError(
                f"The loss at step {self.state.global_step + 1} is not finite. The last checkpoint is from before it. "
                "Try a lower `training.learning_rate`, more `training.warmup_steps`, or `train_dtype=float32`."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "memory_gb": round(memory_gb(), 2)}, *args, **kwargs)


def training_arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The recipe's `training` section, with what every run needs beneath it."""
    beneath = {
        "output_dir": str(output_dir),
        "report_to": ["tensorboard"] if _has_tensorboard() else "none",
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "all",
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": True,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    # Its name changed in 5.2x.
    checkpointing = {"activation_checkpointing", "gradient_checkpointing"} & set(
        TrainingArguments.__dataclass_fields__
    )
    beneath[min(checkpointing)] = recipe.activation_checkpointing
    if recipe.parallelism:
        from accelerate import ParallelismConfig

        beneath["parallelism_config"] = ParallelismConfig(**recipe.parallelism)
    try:
        return TrainingArguments(**{**beneath, **recipe.training})
    except (ValueError, TypeError, ImportError) as error:
        raise RopeScalingError(f"`training`: {' '.join(str(error).split())}") from error


def check_folder(folder: Path, resume: bool) -> None:
    """Refuses a folder that another run would be written over."""
    if (folder / "rows.jsonl").exists():
        raise RopeScalingError(f"The run in {str(folder)!r} is finished. Give another `--output-dir`.")
    if not resume and folder.exists() and any(folder.iterdir()):
        hint = ", or add `--resume` to go on" if any(folder.glob("checkpoint-*")) else ""
        raise RopeScalingError(f"The output folder {str(folder)!r} exists and is not empty. Give a new one{hint}.")


def load(recipe: Recipe, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer as they arrive."""
    extra: dict[str, Any] = {} if recipe.revision is None else {"revision": recipe.revision}
    return load_model(recipe.model, device=str(device), config=config_of(recipe), **extra), tokenizer_of(recipe)


def config_of(recipe: Recipe) -> Any:
    """The model's config, its window widened if the recipe says so."""
    config = load_config(recipe.model, **({} if recipe.revision is None else {"revision": recipe.revision}))
    if recipe.patch.sliding_window == "target":
        reads = int(config.max_position_embeddings * (recipe.patch.factor or 1))
        config.sliding_window = recipe.patch.target_length or reads
    return config


def tokenizer_of(recipe: Recipe) -> Any:
    """The run's tokenizer, with something to pad with."""
    revision = {} if recipe.revision is None or recipe.tokenizer else {"revision": recipe.revision}
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, **revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def reach(model: Any) -> int:
    """Tokens that a model reads as it arrives."""
    return max(slot.reach for slot in read_description(model).slots)


def apply_patch(recipe: Recipe, model: Any) -> int:
    """Patches the model as the recipe says, and returns the length that it is to read.

    Raises:
        RopeScalingError: the model carries another patch, or the method does not suit it.
    """
    wanted, carried = recipe.patch, patch_record(model)
    if wanted.method is None:
        if carried is not None:
            patch(model)
        return max(slot.target_length for slot in read_description(model).slots)
    spec = parse_method(wanted.method)
    extent = {"factor": wanted.factor, "target_length": wanted.target_length}
    given = {key: value for key, value in extent.items() if value is not None}
    own = spec.patch_arguments(wanted.factor) if wanted.factor is not None else spec.arguments
    patch(model, *spec.methods(wanted.factor or 1.0), **{**own, **given})
    if carried is not None and patch_record(model) != carried:
        raise RopeScalingError(
            f"The model {recipe.model!r} was saved under another patch than the recipe's "
            f"({', '.join(one['name'] for one in carried['methods'])}, to {carried['target_length']} tokens). Leave "
            "`patch.method` out to train on under that one, or start from the model it was made from."
        )
    return max(slot.target_length for slot in read_description(model).slots)


def prepare(recipe: Recipe, model: Any) -> Any:
    """The model with adapters, sparse attention and chunked loss, as far as the recipe has them."""
    trainable = model
    if recipe.lora is not None:
        import peft

        options = dict(vars(recipe.lora))
        if not options["modules_to_save"]:
            del options["ensure_weight_tying"]
        try:
            trainable = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        except ValueError as error:
            raise RopeScalingError(f"`lora`: {error}") from error
        if patch_record(model) is not None:
            record_adapter(trainable)
    if recipe.s2_group_size is not None:
        use_s2_attention(trainable, recipe.s2_group_size)
    return trainable if recipe.chunk_size is None else use_chunked_loss(trainable, recipe.chunk_size)


def run_facts(recipe: Recipe, model: Any, dataset: Any) -> dict[str, Any]:
    """What makes two runs the same run: a checkpoint of other facts is not resumed."""
    record = patch_record(model)
    settings = {"data": asdict(recipe.data), "lora": recipe.lora and asdict(recipe.lora), "s2": recipe.s2_group_size}
    digest = hashlib.sha256(str(settings).encode())
    if hasattr(dataset, "__len__"):
        digest.update(
            str([dataset[i]["input_ids"] for i in range(0, len(dataset), max(len(dataset) // 64, 1))]).encode()
        )
    return {
        "patch": None if record is None else {key: record[key] for key in ("methods", "target_length")},
        "frequencies": frequencies_sha256(model),
        "settings_and_data_sha256": digest.hexdigest()[:16],
    }


def finish(recipe: Recipe, trainer: Trainer, tokenizer: Any, dtype: torch.dtype, target: int) -> None:
    """Saves what was trained, as a model or adapter that stands on its own."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.chunk_size is not None:
        remove_chunked_loss(model)
    if recipe.s2_group_size is not None:
        remove_s2_attention(model)
    model.config.use_cache = True  # the Trainer turns it off
    if recipe.lora is None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        model.to(dtype)
    trainer.save_model()
    if trainer.args.should_save:
        tokenizer.model_max_length = target
        tokenizer.save_pretrained(str(trainer.args.output_dir))


def reload(recipe: Recipe, folder: Path) -> Any:
    """The saved result, loaded the way its users do."""
    if recipe.lora is not None and recipe.patch.method is not None:
        return load_adapter(folder)
    if recipe.lora is not None:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder)
    return from_pretrained(folder) if recipe.patch.method is not None else load_model(str(folder))


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def main(argv: list[str] | None = None) -> None:
    """What `accelerate launch` and `torchrun` start, once in every process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a recipe's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="single fields, as in training.max_steps=100")
    parser.add_argument("--output-dir", type=Path, help="runs/RECIPE by default")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint there")
    given = parser.parse_args(argv)
    name = Path(given.config).stem
    try:
        recipe = read_recipe(given.config, given.overrides)
        rows = finetune(recipe, name, given.output_dir or Path("runs") / name, given.resume)
    except RopeScalingError as error:
        sys.exit(f"rope-scaling: error: {error}")
    if rows:
        print(card.markdown(card.losses_table(rows)))


if __name__ == "__main__":
    main()
