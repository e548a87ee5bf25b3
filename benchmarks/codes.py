"""Whether a real model finds again what it read: ten codes planted in a long text and asked for at its end, zero-shot.

    python benchmarks/codes.py                 # the folder in ROPE_SCALING_REAL_MODEL; 25 minutes on two cores
    python benchmarks/codes.py --record

The haystack is Python's own reference. A row holds, for one haystack, the mean log-probability of the answers' tokens
and how many answers are the most likely ones throughout. At the trained length the unpatched model shows what it can
do.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import DynamicCache

import rope_scaling
from rope_scaling import (
    AngleClip,
    DualChunk,
    DynamicYarn,
    LogN,
    Ntk,
    ReRope,
    SelfExtend,
    Yarn,
)
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.texts import read_texts


RESULTS = Path(__file__).parent / "results" / "codes.jsonl"
TRAINED, LENGTH, HAYSTACKS, CHUNK = 8192, 16384, 3, 2048
NAMES = ["Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Larch", "Maple", "Pine", "Willow"]
METHODS = {
    "unpatched": None,
    "ntk": [Ntk(factor=2.0)],
    "yarn": [Yarn(factor=2.0)],
    "dynamic_yarn": [DynamicYarn()],
    "self_extend": [SelfExtend()],
    "rerope": [ReRope()],
    "dual_chunk": [DualChunk()],
    "angle_clip, W = L0": [AngleClip(saturation_length=TRAINED)],
    "angle_clip": [AngleClip()],
    "angle_clip, W = L0/4": [AngleClip(saturation_length=TRAINED // 4)],
    "angle_clip + log_n": [AngleClip(), LogN()],
    "rerope + log_n": [ReRope(), LogN()],
}


def main() -> None:
    source = os.environ["ROPE_SCALING_REAL_MODEL"]
    model, tokenizer = load_model(source), load_tokenizer(source)
    ((_, text),) = read_texts("python-reference")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for label, methods in METHODS.items():
        for length in (TRAINED, LENGTH) if methods is None else (LENGTH,):
            for haystack in range(HAYSTACKS):
                with rope_scaling.patched(model, *methods) if methods else nullcontext():
                    found = ask(model, tokenizer, ids, length, haystack)
                dtype = str(model.dtype).removeprefix("torch.")
                rows.append({"method": label, "tokens": length, "haystack": haystack, "dtype": dtype} | found)
                print(
                    f"{label:22s} {length:6d} tokens, haystack {haystack}: log-probability "
                    f"{found['log_probability']:6.2f} a token, {found['correct']} of {found['asked']} right",
                    flush=True,
                )
    if "--record" in sys.argv:
        RESULTS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


@torch.inference_mode()
def ask(model: torch.nn.Module, tokenizer, filler: list[int], length: int, haystack: int) -> dict:
    """Reads the haystack once, and asks for every code on top of its cache."""
    rng = random.Random(haystack)
    codes = {name: "".join(rng.choice("0123456789") for _ in range(5)) for name in NAMES}

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    planted = [encode(f"\nThe secret code of {name} is {code}.\n") for name, code in codes.items()]
    room = length - 64 - sum(map(len, planted))
    begin = haystack * 30_000
    filler = filler[begin : begin + room]
    places = sorted(rng.sample(range(room // 20, room), len(NAMES)))
    text, last = [tokenizer.bos_token_id or 0], 0
    for place, needle in zip(places, planted, strict=True):
        text += filler[last:place] + needle
        last = place
    ids = torch.tensor([text + filler[last:]])
    cache = DynamicCache(config=model.config)
    for part in ids.split(CHUNK, dim=1):
        model(part, **{CACHE_NAME: cache}, logits_to_keep=1)
    scores, correct = [], 0
    for name, code in codes.items():
        question, answer = encode(f"\nThe secret code of {name} is"), encode(f" {code}.")[:-1]
        tail = torch.tensor([question + answer])
        logits = model(tail, **{CACHE_NAME: cache}).logits[0, len(question) - 1 : -1].float()
        cache.crop(-tail.shape[1])
        wanted = torch.tensor(answer)
        scores.append(torch.log_softmax(logits, -1).gather(1, wanted[:, None]).mean().item())
        correct += bool((logits.argmax(-1) == wanted).all())
    return {"log_probability": sum(scores) / len(scores), "correct": correct, "asked": len(codes)}


if __name__ == "__main__":
    main()
