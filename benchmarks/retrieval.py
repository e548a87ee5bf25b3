"""Whether the embedded model has the retrieval skill that it was trained for, and what becomes of it beyond 256.

    python benchmarks/retrieval.py

Copy: the last 20 of 24 made-up words' tokens, seen at the start. Lookup: three keys of a table at the start. Between
them stands held-out code that fills the length. An answer counts if every token of it is the most likely one.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

import rope_scaling
from rope_scaling.demo import corpus, retrieval
from rope_scaling.hf.loading import load_model, load_tokenizer


RESULTS = Path(__file__).parent / "results" / "retrieval.jsonl"
LENGTHS = (256, 512, 1024, 2048)
EXAMPLES = 60


def main() -> None:
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    rows = [row | {"method": "unpatched"} for row in measure(model, tokenizer)]
    with rope_scaling.patched(model, "yarn", factor=8):
        rows += [row | {"method": "yarn"} for row in measure(model, tokenizer)]
    for row in rows:
        print(f"{row['method']:10s} {row['task']:7s} {row['tokens']:5d} tokens: {row['correct']} of {row['asked']}")
    if "--record" in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


@torch.inference_mode()
def measure(model: torch.nn.Module, tokenizer) -> list[dict]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    filler = encode(corpus.held_out_documents()["asyncio/streams.py"])
    rows = []
    for task in ("copy", "lookup"):
        for length in LENGTHS:
            correct = asked = 0
            for seed in range(EXAMPLES):
                rng = random.Random(seed)
                between = filler[rng.randrange(500) :]
                if task == "copy":
                    example = retrieval.copy_example(rng, encode, between, length - 1, span=24)
                else:
                    example = retrieval.lookup_example(rng, encode, between, length - 1, num_keys=3)
                ids = torch.tensor([[tokenizer.bos_token_id, *example.ids]])
                guesses = model(ids).logits[0].argmax(-1)
                for start, end in example.answers:
                    # Nothing says where the copy begins until its first tokens stand there.
                    first = start + 4 if task == "copy" else start
                    correct += bool(torch.equal(guesses[first:end], ids[0, first + 1 : end + 1]))
                    asked += 1
            rows.append({"task": task, "tokens": length, "correct": correct, "asked": asked})
    return rows


if __name__ == "__main__":
    main()
