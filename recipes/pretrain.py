"""Trains the embedded model from scratch, on the sources of the running interpreter's standard library.

    python -m rope_scaling.recipes.pretrain --config pretrain_demo --output_dir runs/pretrain_demo

Writes an ordinary Transformers folder (bfloat16 safetensors, tokenizer), the loss curve as a picture and as numbers,
and prints the bits per byte on held-out modules beside those of `xz -9e` on the same text.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from rope_scaling.demo import corpus, retrieval


BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


@dataclass(frozen=True)
class PretrainConfig:
    """Model, data and optimisation of the embedded model; the fields are those of the YAML file."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    retrieval_share: float
    """Share of the training windows that are synthetic retrieval, between 0 and 1."""
    num_steps: int
    batch_size: int
    """Windows of `max_position_embeddings` tokens a step."""
    learning_rate: float
    """Peak of a cosine schedule that ends at a hundredth of it."""
    warmup_steps: int
    weight_decay: float
    eval_steps: int
    seed: int


class Windows(torch.utils.data.Dataset):
    """`num_windows` windows of a token stream, each behind a BOS; window `i` depends on `seed` and `i` alone."""

    def __init__(
        self, stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, num_windows: int
    ):
        self.stream, self.tokenizer, self.config, self.num_windows = stream, tokenizer, config, num_windows

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(self.config.seed * 1_000_003 + index)
        length = self.config.max_position_embeddings - 1
        start = rng.randrange(len(self.stream) - length)
        ids = self.stream[start : start + length]
        if rng.random() < self.config.retrieval_share:
            ids = torch.tensor(self.retrieval(rng, ids.tolist(), length))
        ids = torch.cat([torch.tensor([self.tokenizer.bos_token_id]), ids])
        labels = torch.full((length + 1,), -100)
        labels[: len(ids)] = ids
        padded = torch.full((length + 1,), self.tokenizer.eos_token_id)
        padded[: len(ids)] = ids
        return {"input_ids": padded, "labels": labels}

    def retrieval(self, rng: random.Random, filler: list[int], length: int) -> list[int]:
        def to_ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        length = rng.randint(length // 3, length)
        if rng.random() < 0.5:
            return retrieval.copy_example(rng, to_ids, filler, length, span=rng.randint(8, length // 3)).ids
        return retrieval.lookup_example(rng, to_ids, filler, length, num_keys=rng.randint(1, length // 32)).ids


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default="pretrain_demo", help="a YAML file, or the name of one that ships with the package"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, help="override, for a quick look")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, num_steps=arguments.num_steps)

    started = time.monotonic()
    train_texts, held_out = corpus.training_documents(), corpus.held_out_documents()
    tokenizer = train_tokenizer(train_texts.values(), config)
    stream, held_out_stream = token_stream(train_texts.values(), tokenizer), token_stream(held_out.values(), tokenizer)
    print(f"{len(stream):,} training tokens, {len(held_out_stream):,} held-out tokens", flush=True)

    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    held_out_windows = consecutive_windows(held_out_stream, tokenizer, config.max_position_embeddings)
    trainer = Trainer(
        model,
        training_arguments(config, arguments.output_dir),
        train_dataset=Windows(stream, tokenizer, config, config.num_steps * config.batch_size),
        eval_dataset=[held_out_windows[i] for i in range(0, len(held_out_windows), 20)],
    )
    trainer.train()

    model.config.use_cache = True  # the Trainer sets it to False
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    quality = {
        "python": platform.python_version(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": config.num_steps * config.batch_size * config.max_position_embeddings,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "held_out_documents": len(held_out),
        "bits_per_byte": bits_per_byte(model, held_out_windows, held_out),
        "xz_bits_per_byte": xz_bits_per_byte(held_out),
    }
    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    (arguments.output_dir / "training.json").write_text(
        json.dumps({"quality": quality, "history": history}, indent=1) + "\n"
    )
    plot_loss(history, arguments.output_dir / "loss.png")
    print(json.dumps(quality, indent=1))


def load_config(name: str, **overrides: object) -> PretrainConfig:
    """The configuration in a YAML file, or in the one of that name in this package; an unknown key is an error."""
    path = (
        Path(name)
        if name.endswith(".yaml")
        else Path(str(resources.files(__package__ or "rope_scaling.recipes"))) / f"{name}.yaml"
    )
    (config,) = HfArgumentParser(cast(Any, PretrainConfig)).parse_yaml_file(path)
    return type(config)(**vars(config) | {key: value for key, value in overrides.items() if value is not None})


def train_tokenizer(texts: Iterable[str], config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=config.max_position_embeddings,
    )


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents, each closed by an EOS, as one tensor of token ids, int64."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in encoded)))


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    shape = {name: getattr(config, name) for name in SHAPE}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, **special, rope_parameters=rope, tie_word_embeddings=True))


SHAPE = (
    *("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
)


def training_arguments(config: PretrainConfig, output_dir: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.num_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.01},
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=True,
        seed=config.seed,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        per_device_eval_batch_size=config.batch_size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def consecutive_windows(
    stream: torch.Tensor, tokenizer: PreTrainedTokenizerFast, length: int
) -> list[dict[str, torch.Tensor]]:
    """The whole stream in windows of `length` tokens, each of which starts again with a BOS."""
    bos = torch.tensor([tokenizer.bos_token_id])
    windows = (torch.cat([bos, piece]) for piece in stream.split(length - 1) if len(piece) == length - 1)
    return [{"input_ids": window, "labels": window} for window in windows]


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, windows: list[dict[str, torch.Tensor]], texts: dict[str, str]) -> float:
    """Bits that the model needs for a byte of the texts when it starts again every trained length."""
    model.eval()
    batches = torch.stack([window["input_ids"] for window in windows]).split(32)
    nats = sum(model(ids, labels=ids).loss.item() * ids[:, 1:].numel() for ids in batches)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts.values())


def xz_bits_per_byte(texts: dict[str, str]) -> float:
    """Bits that `xz -9e` needs for a byte of the same texts, run together."""
    data = "".join(texts.values()).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def plot_loss(history: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training (a tenth of it retrieval)"), ("eval_loss", "held-out modules")):
        rows = [(row["step"], row[key]) for row in history if key in row]
        axes.plot(*zip(*rows, strict=True), label=label, marker="." if key == "eval_loss" else None)
    axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(None, 5.5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
