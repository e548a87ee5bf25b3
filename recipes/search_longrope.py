"""Searches LongRoPE factors for a model: an evolution over non-decreasing lists, by loss beyond the trained length.

    python -m rope_scaling.recipes.search_longrope --output rope_scaling/demo/longrope.json

A small form of the search in [LongRoPE](https://huggingface.co/papers/2402.13753): it starts from the closed forms
that this library has, keeps the best lists of each generation, and mutates them. It never returns worse than its
seeds on the search documents. Those are training modules of the embedded model, so that its evaluation documents stay
unseen.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from rope_scaling import default_inv_freq, make_method, patched
from rope_scaling.demo.corpus import training_documents
from rope_scaling.eval.documents import Document, make_documents
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.geometry import RopeGeometry
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.hf.pretrained_rope import pretrained_settings, read_pretrained
from rope_scaling.hf.rotary import rotary_slots


SEEDS = ("linear", "ntk", "ntk_by_parts", "yarn", "mrrope_pro", "llama3")
SURVIVORS = 6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="'demo', a folder, or a hub id")
    parser.add_argument("--factor", type=float, default=8.0)
    parser.add_argument(
        "--documents", type=int, default=8, help="search documents of `factor` times the trained length"
    )
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--children", type=int, default=16, help="new lists a generation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)

    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    (slot,) = rotary_slots(model)
    geometry = read_pretrained(slot, pretrained_settings(model.config)).geometry
    length = int(read_description(model).slots[0].reach * arguments.factor)
    texts = ((name, text) for name, text in training_documents().items() if "test" not in name)
    documents = make_documents(texts, tokenizer, [length], max_documents=arguments.documents).items

    rng = random.Random(arguments.seed)
    ranked = sorted(
        (loss(model, documents, factors, arguments.factor), factors) for factors in seeds(geometry, arguments.factor)
    )
    best_seed = ranked[0][0]
    for generation in range(arguments.generations):
        parents = [factors for _, factors in ranked[:SURVIVORS]]
        children = [mutate(rng.choice(parents), arguments.factor, rng) for _ in range(arguments.children)]
        ranked = sorted(
            [*ranked[:SURVIVORS], *((loss(model, documents, child, arguments.factor), child) for child in children)]
        )
        print(f"generation {generation + 1}: loss {ranked[0][0]:.4f} (best seed {best_seed:.4f})", flush=True)
    found = {
        "long_factor": [round(value, 4) for value in ranked[0][1]],
        "factor": arguments.factor,
        "search_loss": ranked[0][0],
        "best_seed_loss": best_seed,
        "search_documents": [document.name for document in documents],
        "seed": arguments.seed,
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def seeds(geometry: RopeGeometry, factor: float) -> list[list[float]]:
    """Factors that the closed forms amount to."""
    methods: list[Any] = [make_method(name, factor=factor) for name in SEEDS]
    return [(default_inv_freq(geometry) / method.frequencies(geometry)[0]).tolist() for method in methods]


def mutate(parent: list[float], factor: float, rng: random.Random) -> list[float]:
    """A child: a smooth bump in the logarithms somewhere, then non-decreasing and between 1 and 1.25 times the
    factor."""
    centre, width, height = rng.uniform(0, len(parent)), rng.uniform(1, len(parent) / 4), rng.gauss(0, 0.25)
    bumps = [2 ** (height * max(0.0, 1 - abs(i - centre) / width)) for i in range(len(parent))]
    child, floor = [], 1.0
    for value, bump in zip(parent, bumps, strict=True):
        floor = min(max(floor, value * bump), 1.25 * factor)
        child.append(floor)
    return child


def loss(model: torch.nn.Module, documents: list[Document], factors: list[float], factor: float) -> float:
    """Mean loss beyond the trained length, in nats a token."""
    trained = int(len(documents[0].ids) / factor)
    with patched(model, "longrope", long_factor=factors, factor=factor):
        curves = [nll_curve(model, document.ids[None], 2048)[0, trained - 1 :] for document in documents]
    return torch.cat(curves).double().mean().item()


if __name__ == "__main__":
    main(sys.argv[1:])
