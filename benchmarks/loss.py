"""Memory and time of the loss at 16,384 tokens and a vocabulary of 49,152: in chunks, and Transformers' own.

    python benchmarks/loss.py             # 3 minutes on two cores that do nothing else
    python benchmarks/loss.py --record    # also rewrites benchmarks/results/loss.jsonl

The head of SmolLM2-135M (width 576; bfloat16, or float32 on a processor that is slow in it), forward and backward,
each in a process of its own; peak memory is what the process adds to what it held before. Times alternate in one
process, at 4,096 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from attention import DTYPE, status
from transformers.loss.loss_utils import ForCausalLMLoss

from rope_scaling.training import chunked_cross_entropy


RESULTS = Path(__file__).parent / "results" / "loss.jsonl"
VOCABULARY, WIDTH = 49_152, 576


class Losses:
    """One head and one sequence, and its loss either way with gradients."""

    def __init__(self, length: int):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).to(DTYPE)
        self.hidden = torch.randn(1, length, WIDTH, dtype=DTYPE, requires_grad=True)
        self.labels = torch.randint(VOCABULARY, (1, length))

    def run(self, way: str) -> float:
        self.head.weight.grad = self.hidden.grad = None
        if way == "stock":
            loss = ForCausalLMLoss(self.head(self.hidden), self.labels, VOCABULARY, shift_labels=self.labels)
        else:
            loss = chunked_cross_entropy(self.hidden, self.head, self.labels, chunk_size=512)
        loss.backward()
        return float(loss.detach())


def peak(way: str, length: int) -> int:
    losses = Losses(64)
    losses.run(way)
    losses = Losses(length)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    losses.run(way)
    return status("VmHWM") - before


def memory(length: int) -> dict:
    found = {}
    for way in ("chunked", "stock"):
        command = [sys.executable, __file__, way, str(length)]
        found[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    own, stock = found["chunked"], found["stock"]
    print(f"peak at {length}: {own / 2**20:.0f} MB in chunks, {stock / 2**20:.0f} MB stock, {own / stock:.3f}")
    return {"what": "peak memory", "length": length, "bytes": own, "stock_bytes": stock, "ratio": own / stock}


def speed(length: int, repeats: int = 5) -> dict:
    losses = Losses(length)
    times: dict[str, list[float]] = {"chunked": [], "stock": []}
    for repeat in range(repeats + 1):
        for way in sorted(times, reverse=bool(repeat % 2)):
            start = time.perf_counter()
            losses.run(way)
            if repeat:
                times[way].append(time.perf_counter() - start)
    ms = {way: 1000 * median(values) for way, values in times.items()}
    ratio = ms["chunked"] / ms["stock"]
    print(f"time at {length}: {ms['chunked']:.0f} ms in chunks, {ms['stock']:.0f} ms stock, {ratio:.3f}")
    return {"what": "time", "length": length, "ms": ms["chunked"], "stock_ms": ms["stock"], "ratio": ratio}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ("chunked", "stock"):
        print(peak(sys.argv[1], int(sys.argv[2])))
        return
    rows = [memory(16_384), speed(4096)]
    about = {"vocabulary": VOCABULARY, "width": WIDTH, "dtype": str(DTYPE).removeprefix("torch.")}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if "--record" in sys.argv:
        RESULTS.write_text("".join(json.dumps(row | about, sort_keys=True) + "\n" for row in rows))


if __name__ == "__main__":
    main()
