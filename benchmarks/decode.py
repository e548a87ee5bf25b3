"""Decoding at a long context: tokens a second, stock and patched alternating token by token in one run.

python benchmarks/decode.py                # the shape of SmolLM2-135M with random weights: speed does not see them
python benchmarks/decode.py --record       # also rewrites benchmarks/results/decode.jsonl
python benchmarks/decode.py --streaming    # the embedded model: time a token and memory over 20,000 of them
"""

from __future__ import annotations

import copy
import json
import math
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch
from attention import DTYPE, processor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import rope_scaling
from rope_scaling import AngleClip, DualChunk, DynamicYarn, LmInfinite, ReRope, SelfExtend
from rope_scaling.hf.cache import rotated_copies
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.loading import load_model
from rope_scaling.methods import method_text


RESULTS = Path(__file__).parent / "results" / "decode.jsonl"
CONTEXT = 16384
TOKENS = 24
METHODS = [
    *(ReRope(), SelfExtend(), AngleClip(), AngleClip(max_angle=math.pi), LmInfinite(), DualChunk(), DynamicYarn()),
]
STREAMED = 20_000


def make_model() -> torch.nn.Module:
    """SmolLM2-135M's shape, random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(DTYPE).eval()


def filled_cache(model: torch.nn.Module) -> DynamicCache:
    """A cache of random keys and values, as after a prompt of `CONTEXT` tokens."""
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.update(*(torch.randn(1, 3, CONTEXT, 64, dtype=DTYPE) for _ in range(2)))
    return cache


@torch.inference_mode()
def decode(model: torch.nn.Module, twin: torch.nn.Module, method: object) -> dict:
    """Median time of a token, of the stock model and of its patched twin."""
    rope_scaling.patch(twin, method)
    stock, patched = filled_cache(model), filled_cache(model)
    ids = torch.ones(1, 1, dtype=torch.long)
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(TOKENS + 2):
        for is_patched in (False, True) if step % 2 else (True, False):
            start = time.perf_counter()
            (twin if is_patched else model)(ids, **{CACHE_NAME: patched if is_patched else stock})
            seconds = time.perf_counter() - start
            if step >= 2:
                times[is_patched].append(seconds)
    rotated = rotated_copies(patched)
    rope_scaling.unpatch(twin)
    stock_ms, patched_ms = 1000 * median(times[False]), 1000 * median(times[True])
    return row(method_text(method)) | {
        "context": CONTEXT,
        "tokens": TOKENS,
        "stock_ms": stock_ms,
        "patched_ms": patched_ms,
        "tokens_per_second_ratio": stock_ms / patched_ms,
        "rotated_copies": rotated,
    }


@torch.inference_mode()
def streaming() -> dict:
    """Time a token and peak memory at the beginning and at the end of a long generation by the embedded model."""
    model = load_model("demo")
    rope_scaling.patch(model, "streaming")
    cache, token = DynamicCache(config=model.config), torch.ones(1, 1, dtype=torch.long)
    times, memory = [], []
    for step in range(STREAMED):
        start = time.perf_counter()
        token = model(token, **{CACHE_NAME: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - start)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if step % 2000 == 1999:
            print(
                f"{step + 1:6d} tokens  {1000 * median(times[-2000:]):6.2f} ms a token  {memory[-1]:7.1f} MB",
                flush=True,
            )
    tenth = STREAMED // 10
    return row("streaming") | {
        "tokens": STREAMED,
        "early_ms": 1000 * median(times[tenth : 2 * tenth]),
        "late_ms": 1000 * median(times[-tenth:]),
        "early_peak_mb": memory[tenth],
        "late_peak_mb": memory[-1],
        "cached_tokens": cache.layers[0].keys.shape[-2],
    }


def row(method: str) -> dict:
    return {
        "method": method,
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": processor(),
    }


def main() -> None:
    if "--streaming" in sys.argv:
        rows = [streaming()]
    else:
        model = make_model()
        rows, twin = [], copy.deepcopy(model)
        for method in METHODS:
            found = decode(model, twin, method)
            rows.append(found)
            print(
                f"{found['method']:14s} stock {found['stock_ms']:7.1f} ms  patched {found['patched_ms']:7.1f} ms  "
                f"tokens a second {found['tokens_per_second_ratio']:.3f} of stock  "
                f"rotated keys {found['rotated_copies']:.2f} copies of the cached ones",
                flush=True,
            )
    if "--record" in sys.argv:
        kept = []
        if RESULTS.exists():
            kept = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        names = {found["method"] for found in rows}
        rows = [old for old in kept if old["method"] not in names] + rows
        RESULTS.write_text("".join(json.dumps(found, sort_keys=True) + "\n" for found in rows))


if __name__ == "__main__":
    main()
