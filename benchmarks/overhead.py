"""What a patch costs at run time: forward and decode, patched against stock, alternating in one run on one machine.

    python benchmarks/overhead.py            # the embedded model; and a real one, if ROPE_SCALING_REAL_MODEL names
    its folder

Prints the ratio of median times for each, and appends rows to benchmarks/results/overhead.jsonl with --record.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

import rope_scaling
from rope_scaling.hf.loading import load_model


RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"


def main() -> None:
    models = {"demo": "demo"}
    if real := os.environ.get("ROPE_SCALING_REAL_MODEL"):
        models["HuggingFaceTB/SmolLM2-135M-Instruct"] = real
    rows = [row for label, source in models.items() for row in measure(label, source)]
    for row in rows:
        print(
            f"{row['model']:36s} {row['what']:8s} stock {row['stock_ms']:9.2f} ms  patched "
            f"{row['patched_ms']:9.2f} ms  ratio {row['ratio']:.3f}"
        )
    if "--record" in sys.argv:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


@torch.inference_mode()
def measure(label: str, source: str) -> list[dict]:
    model = load_model(source)
    length = model.config.max_position_embeddings if label == "demo" else 1024
    ids = torch.randint(2, 1000, (1, length), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        model(ids, use_cache=False)

    def decode() -> None:
        model.generate(ids[:, :32], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    repeats = {"forward": 60, "decode": 40} if label == "demo" else {"forward": 12, "decode": 12}
    rows = []
    for what, run in (("forward", forward), ("decode", decode)):
        stock, patched = [], []
        for i in range(repeats[what] + 2):
            # The order within a pair changes, so that neither side always runs on the warmer machine.
            for is_patched in (False, True) if i % 2 else (True, False):
                if is_patched:
                    with rope_scaling.patched(model, "yarn", factor=4):
                        seconds = timed(run)
                else:
                    seconds = timed(run)
                if i >= 2:
                    (patched if is_patched else stock).append(seconds)
        rows.append(
            {
                "model": label,
                "what": what,
                "method": "yarn",
                "tokens": length if what == "forward" else 16,
                "stock_ms": 1000 * median(stock),
                "patched_ms": 1000 * median(patched),
                "ratio": median(patched) / median(stock),
                "pairs": repeats[what],
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                "threads": torch.get_num_threads(),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }
        )
    return rows


def timed(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
