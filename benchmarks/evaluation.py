"""What an evaluation costs: the pass at 8x against a bare chunked forward over the same tokens, and its peak memory.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --real     # passes over 16,384 tokens of the model in ROPE_SCALING_REAL_MODEL

Time: both alternate in one run on one machine; the ratio is of medians. Memory: peak resident size of one process for
each length, of the evaluation and of one call with all logits, on a model with a vocabulary of 49,152.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

import rope_scaling
from rope_scaling.eval.perplexity import nll_curve
from rope_scaling.hf.loading import load_model


RESULTS = Path(__file__).parent / "results" / "evaluation.jsonl"
CHUNK = 512
LENGTHS = (2048, 4096, 8192)


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    measured = spans_on_a_real_model() if "--real" in sys.argv else [time_ratio(), *memory()]
    rows = [{**row, "versions": versions} for row in measured]
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if key != "versions"
            )
        )
    if "--record" in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
        new = {row["what"] for row in rows}
        rows = [row for row in old if row["what"] not in new] + rows
        RESULTS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def spans_on_a_real_model(pairs: int = 3) -> list[dict]:
    """An evaluation's pass over 16,384 tokens, patched and stock in turns."""
    model = load_model(os.environ["ROPE_SCALING_REAL_MODEL"], dtype="bfloat16")
    ids = torch.randint(2, 40000, (1, 16384), generator=torch.Generator().manual_seed(0))
    rows = []
    for name in ("self_extend", "angle_clip"):
        stock, patched = [], []
        for i in range(pairs):
            for is_patched in (False, True) if i % 2 else (True, False):
                with rope_scaling.patched(model, name) if is_patched else nullcontext():
                    started = time.perf_counter()
                    nll_curve(model, ids, 2048)
                    (patched if is_patched else stock).append(time.perf_counter() - started)
        rows.append(
            {
                "what": f"whole pass, {name}",
                "tokens": ids.shape[1],
                "chunk_size": 2048,
                "stock_ms": 1000 * median(stock),
                "patched_ms": 1000 * median(patched),
                "ratio": median(patched) / median(stock),
                "pairs": pairs,
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def time_ratio(pairs: int = 20) -> dict:
    model = load_model("demo")
    ids = torch.randint(
        2, 1000, (1, 8 * model.config.max_position_embeddings), generator=torch.Generator().manual_seed(0)
    )
    bare, evaluation = [], []
    for i in range(pairs + 2):
        for run, times in ((bare_forward, bare), (nll_curve, evaluation))[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            run(model, ids, CHUNK)
            if i >= 2:
                times.append(time.perf_counter() - started)
    return {
        "what": "pass at 8x",
        "tokens": ids.shape[1],
        "chunk_size": CHUNK,
        "bare_ms": 1000 * median(bare),
        "evaluation_ms": 1000 * median(evaluation),
        "ratio": median(evaluation) / median(bare),
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def bare_forward(model: torch.nn.Module, ids: torch.Tensor, chunk_size: int) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for start in range(0, ids.shape[1], chunk_size):
        piece = ids[:, start : start + chunk_size]
        positions = torch.arange(start, start + piece.shape[1])[None]
        model(input_ids=piece, position_ids=positions, past_key_values=cache, use_cache=True)


def memory() -> list[dict]:
    rows = []
    for what in ("evaluation", "all logits"):
        for length in LENGTHS:
            command = [sys.executable, __file__, "--memory", what, str(length)]
            rows.append(
                {
                    "what": f"peak memory, {what}",
                    "tokens": length,
                    "megabytes": float(subprocess.check_output(command)),
                }
            )
    return rows


@torch.inference_mode()
def peak(what: str, length: int) -> float:
    """Megabytes that a pass adds to the resident size before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, max_position_embeddings=max(LENGTHS), **shape)).eval()
    ids = torch.zeros(1, length, dtype=torch.long)
    nll_curve(model, ids[:, :16], 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "evaluation":
        nll_curve(model, ids, CHUNK)
    else:
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
