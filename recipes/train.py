"""Fine-tunes a model to a longer context: config, model, patch, data, Trainer, save, evaluate.

    rope-scaling finetune demo_yarn
    accelerate launch -m rope_scaling.recipes.train --config demo_yarn

Read from `finetune` down.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.documents import parse_lengths
from rope_scaling.eval.scoring.identity import weights_sha256
from rope_scaling.hf.adapters import record_adapter
from rope_scaling.hf.chunked_loss import remove_chunked_loss, use_chunked_loss
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.dtype import compute_dtype, stored_dtype
from rope_scaling.hf.loading import (
    check_language_model,
    is_adapter,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    open_adapter,
)
from rope_scaling.hf.patch import patch, patch_record, patched_in_attention
from rope_scaling.hf.s2 import remove_s2_attention, use_s2_attention
from rope_scaling.lengths import in_tokens
from rope_scaling.methods import patch_arguments
from rope_scaling.recipes import card
from rope_scaling.recipes.callbacks import Epochs, PositionLosses, StopOnInterrupt, memory_gb
from rope_scaling.recipes.checkpoints import WholeCheckpoints, check_folder, last_checkpoint, run_facts, saving
from rope_scaling.recipes.config import Recipe, read_recipe
from rope_scaling.recipes.failures import from_worker, stopped
from rope_scaling.recipes.measure import Measured
from rope_scaling.recipes.preflight import check_patched, check_recipe, check_sharded
from rope_scaling.recipes.processes import gather, only_first_loads, patient_group
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
        RopeScalingError: anything that the user can fix.
    """
    check_folder(output_dir, resume)
    arguments = training_arguments(recipe, output_dir)
    set_seed(arguments.seed)
    main_process = arguments.process_index == 0
    patient_group()

    # Everything that can be refused, without weights; then what it is trained and measured on.
    rehearsal = rehearse(recipe)
    tokenizer, trained, target = rehearsal.tokenizer, rehearsal.trained, rehearsal.target
    lengths = parse_lengths(recipe.evaluation.lengths, trained)
    dataset = training_data(recipe, tokenizer)
    documents = evaluation_documents(recipe, tokenizer, lengths)
    collator = make_collator(recipe, tokenizer, target)

    # The model without a patch, then patched; its losses either way.
    only_first = only_first_loads()
    model: Any = load(recipe, arguments.device, lengths[-1]) if main_process or not only_first else None
    measured = Measured(recipe, name, documents, lengths, trained, output_dir, resume)
    # A hub revision may move, and a folder be written to, between a run and its continuation.
    weights = gather(weights_sha256(model) if main_process else "")[0]
    measured.take("unpatched", model)
    if model is not None:
        apply_patch(recipe, model)
    measured.take("before", model)

    # What is trained.
    if only_first:
        model = unsharded(model, rehearsal)
    saved_dtype = stored_dtype(config_of(recipe)) or model.dtype
    trainable = prepare(recipe, model.to(train_dtype(recipe, arguments.device)))
    facts = run_facts(recipe, model, dataset) | {"weights": weights}
    trainer = LongContextTrainer(trainable, arguments, train_dataset=dataset, data_collator=collator)
    check_sharded(recipe, trainer.is_fsdp_enabled)
    trainer.add_callback(WholeCheckpoints(trainer, facts))
    if isinstance(collator, PoseCollator):
        trainer.add_callback(Epochs(collator))
    if every := recipe.evaluation.every:
        few, size = documents.items[:2], recipe.evaluation.chunk_size
        trainer.add_callback(PositionLosses(trainer, few, lengths, trained, every, size))

    # Training.
    checkpoint = last_checkpoint(output_dir, facts) if resume else None
    minutes = train(trainer, checkpoint)

    # The result, measured as its users will load it.
    with saving(output_dir, trainer.state.global_step):
        finish(recipe, trainer, tokenizer, saved_dtype, target)
    gather(None)  # all of it is on disk, which other machines may not see
    loads = main_process or (not only_first and (output_dir / "tokenizer_config.json").exists())
    measured.take("after", reload(recipe, output_dir, arguments.device, lengths[-1]) if loads else None)
    if not main_process:
        return []
    state = trainer.state
    with saving(output_dir, trainer.state.global_step):
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
        RopeScalingError: saving or reading failed, memory ran out, or Ctrl-C stopped the run after saving.
    """
    interrupt = StopOnInterrupt()
    trainer.add_callback(interrupt)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:  # data come from anywhere, and may fail in any way
        if isinstance(error, RopeScalingError) and not from_worker(error):
            raise
        if (told := stopped(trainer, error)) is None:
            raise
        raise told from error
    finally:
        interrupt.restore()
    if interrupt.asked and trainer.state.global_step < trainer.state.max_steps:
        raise RopeScalingError(
            f"Stopped and saved at step {trainer.state.global_step} of {trainer.state.max_steps}. The same command "
            "with `--resume` goes on."
        )
    return (time.monotonic() - started) / 60


class LongContextTrainer(Trainer):
    """Stops at a loss that is not finite, says why saving failed, and logs memory."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(str(self.args.output_dir)), self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)

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
        "remove_unused_columns": False,  # there are none
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


@dataclass(frozen=True)
class Rehearsal:
    """A recipe on its model without weights."""

    model: Any
    """Patched."""
    tokenizer: Any
    trained: int
    """Context length of the model as loaded, in tokens."""
    target: int
    """Tokens that it is to read."""


def rehearse(recipe: Recipe) -> Rehearsal:
    """Patches and checks the model that a recipe names, without loading its weights.

    Raises:
        RopeScalingError: the run would be refused, or would train something else than the recipe says.
    """
    check_recipe(recipe)
    config = config_of(recipe)
    check_language_model(recipe.model, config)
    if recipe.lora is not None and is_adapter(recipe.model):
        raise RopeScalingError(
            f"`model` {recipe.model!r} is an adapter, and an adapter trained on it would name its base model alone. "
            "Merge it first (`merge_and_unload().save_pretrained(...)`), or leave `lora` out."
        )
    tokenizer = tokenizer_of(recipe)
    model: Any = load_skeleton(recipe.model, config)
    model.tie_weights()
    target = apply_patch(recipe, model)
    trained = max(slot.reach for slot in read_description(model).slots)
    check_patched(recipe, model, tokenizer, target, patched_in_attention(model))
    prepare(recipe, copy.deepcopy(model))
    return Rehearsal(model, tokenizer, trained, target)


def load(recipe: Recipe, device: torch.device, length: int | None = None) -> Any:
    """The model as it was saved; to be measured on texts of up to `length` tokens."""
    return load_model(recipe.model, device=str(device), config=config_of(recipe), length=length, **_revision(recipe))


def train_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The dtype of the weights that are trained."""
    stored = stored_dtype(config_of(recipe)) or torch.float32
    wanted = compute_dtype(recipe.train_dtype, stored, device)
    return wanted if isinstance(wanted, torch.dtype) else stored


def _revision(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.revision is None else {"revision": recipe.revision}


def unsharded(model: Any, rehearsal: Rehearsal) -> Any:
    """What a process gives to be sharded: the first one its patched model, from main memory; the others one without
    weights, which the first one's are sent to."""
    return rehearsal.model if model is None else model.to("cpu")


def config_of(recipe: Recipe) -> Any:
    """The model's config, its window widened if the recipe says so."""
    config = load_config(recipe.model, **_revision(recipe))
    wanted, text = recipe.patch, config.get_text_config()
    if wanted.sliding_window == "target":
        trained = wanted.original_max_position_embeddings or text.max_position_embeddings
        target = wanted.target_length or int(trained * (wanted.factor or 1))
        text.sliding_window = in_tokens("target_length", target, trained)
    return config


def tokenizer_of(recipe: Recipe) -> Any:
    """The run's tokenizer, with something to pad with."""
    revision = {} if recipe.revision is None or recipe.tokenizer else {"revision": recipe.revision}
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, **revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def apply_patch(recipe: Recipe, model: Any) -> int:
    """Patches the model as the recipe says, and returns the length that it is to read.

    Raises:
        RopeScalingError: the model carries another patch, or the method does not suit it.
    """
    wanted, carried = recipe.patch, patch_record(model)
    if wanted.methods is None:
        if carried is not None:
            patch(model)
        return max(slot.target_length for slot in read_description(model).slots)
    methods, arguments = patch_arguments(
        wanted.methods,
        factor=wanted.factor,
        target_length=wanted.target_length,
        original_max_position_embeddings=wanted.original_max_position_embeddings,
    )
    patch(model, *methods, **arguments)
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


def finish(recipe: Recipe, trainer: Trainer, tokenizer: Any, dtype: torch.dtype, target: int) -> None:
    """Saves what was trained, as a model or adapter that loads without the trainer."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.chunk_size is not None:
        remove_chunked_loss(model)
    if recipe.s2_group_size is not None:
        remove_s2_attention(model)
    model.config.use_cache = True  # the Trainer sets it to False
    if recipe.lora is None and not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        model.to(dtype)
    trainer.save_model()
    if trainer.args.should_save:
        tokenizer.model_max_length = target
        tokenizer.save_pretrained(str(trainer.args.output_dir))


def reload(recipe: Recipe, folder: Path, device: torch.device, length: int) -> Any:
    """The saved result, loaded the way its users do."""
    if recipe.lora is None:
        return load_model(str(folder), device=str(device), length=length)
    base = load_model(recipe.model, device=str(device), length=length, **_revision(recipe))
    return open_adapter(str(folder), base)


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
