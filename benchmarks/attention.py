"""Prefill attention of one layer in the shape of SmolLM2-135M, bfloat16: ours and stock alternating in one run.

    python benchmarks/attention.py             # 6 minutes on two cores that do nothing else
    python benchmarks/attention.py --record    # also rewrites benchmarks/results/attention.jsonl
    python benchmarks/attention.py --only-memory

Ratios are of median times. Memory is what a call adds to the process at its peak beside its output, over the size
of query, key and value; each method in a process of its own.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from rope_scaling import (
    AngleClip,
    DualChunk,
    DynamicYarn,
    LmInfinite,
    ReRope,
    RopeGeometry,
    SelfExtend,
    SlidingWindow,
    SpanMethod,
    WavePrune,
    default_inv_freq,
)
from rope_scaling.attention.plan import Plan, apply_rotation
from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.tiled import tiled_attention
from rope_scaling.hf.dtype import is_fast
from rope_scaling.spans import Rope


RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
GEOMETRY = RopeGeometry(rotary_dim=64, rope_theta=1e5, original_max_position_embeddings=8192)
INV_FREQ = default_inv_freq(GEOMETRY).float()
LAYOUT = RotaryLayout(64)
SCALE = 0.125
METHODS: dict[str, SpanMethod] = {
    "rerope": ReRope(),
    "self_extend": SelfExtend(),
    "angle_clip": AngleClip(),
    "lm_infinite": LmInfinite(),
    "dual_chunk": DualChunk(),
    "dynamic_yarn, 3 steps": DynamicYarn(steps=(1.0, 1.5, 2.0)),
    "angle_clip, uniform": AngleClip(max_angle=math.pi),
    "waveprune": WavePrune(),
    "window 1024": SlidingWindow(window=1024),
    "window 1024, 4 sinks": SlidingWindow(window=1024, num_sinks=4),
}


DTYPE = torch.bfloat16 if is_fast(torch.bfloat16) else torch.float32
"""What a bfloat16 checkpoint is computed in on this processor."""


def tensors(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 64, dtype=DTYPE) for heads in (9, 3, 3))
    return query, key, value


def ours(name: str, length: int) -> Callable[..., torch.Tensor]:
    """Attention of one method; positions, schedule and rotations are worked out at the first call, as in a model."""
    positions = torch.arange(length)
    segment = Segment(slice(0, 1), slice(0, length), slice(0, length), positions, positions)
    spans = METHODS[name].spans(Rope(GEOMETRY, INV_FREQ.double(), 8192))
    plan = Plan(spans, [segment], LAYOUT, INV_FREQ)
    return lambda q, k, v: tiled_attention(q, k, v, plan, SCALE)


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)


def stock_with_window(length: int, window: int) -> Callable[..., torch.Tensor]:
    """What Transformers does for a sliding window: the same kernel under a mask."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = ((distance >= 0) & (distance < window))[None, None]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), attn_mask=mask, scale=SCALE
    )


def two_score_matrices(length: int) -> Callable[..., torch.Tensor]:
    """ReRoPE as it is usually written: both products in full, one chosen, softmax in float32."""
    positions = torch.arange(length)
    segment = Segment(slice(0, 1), slice(0, length), slice(0, length), positions, positions)
    near, far = ReRope().spans(Rope(GEOMETRY, INV_FREQ.double(), 8192))
    plan = Plan([near, far], [segment], LAYOUT, INV_FREQ)
    distance = positions[:, None] - positions

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        far_q = apply_rotation(q, plan.query_rotation(segment, far), LAYOUT)
        far_k = apply_rotation(k, plan.key_rotation(segment, far), LAYOUT).repeat_interleave(3, 1)
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        scores = torch.where(distance < 4096, q @ k.transpose(-1, -2), far_q @ far_k.transpose(-1, -2)) * SCALE
        scores = scores.masked_fill(distance < 0, -torch.inf)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return attend


@torch.inference_mode()
def compare(what: str, one: Callable, against: str, other: Callable, length: int, repeats: int = 7) -> dict:
    """Median times of both, run in turns."""
    inputs = tensors(length)
    times: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats + 1):
        for mine in (True, False) if repeat % 2 else (False, True):
            start = time.perf_counter()
            (one if mine else other)(*inputs)
            if repeat:
                times[mine].append(time.perf_counter() - start)
    ms, against_ms = (1000 * median(times[mine]) for mine in (True, False))
    row = {"what": what, "against": against, "length": length, "ms": ms, "against_ms": against_ms}
    print(f"{what:22s} {length:6d}  {ms:9.1f} ms   {against:26s} {against_ms:9.1f} ms   ratio {ms / against_ms:.3f}")
    return row | {"ratio": ms / against_ms, "repeats": repeats}


@torch.inference_mode()
def peak_memory(name: str, length: int) -> float:
    """Bytes that a call adds to what this process holds, at its peak; the process must be fresh."""
    ours(name, 256)(*tensors(256))
    inputs, attend = tensors(length), ours(name, length)
    # Linux's own high-water mark, set back first: that of `getrusage` outlives the start of a process.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    out = attend(*inputs)
    return status("VmHWM") - before - out.numel() * out.element_size()


def status(name: str) -> int:
    """A size from the process's status, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def memory_row(name: str, length: int) -> dict:
    size = 2 * 64 * length * (9 + 3 + 3)
    command = [sys.executable, __file__, "--memory", name, str(length)]
    extra = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{name:22s} {length:6d}  peak {extra / 2**20:6.1f} MB more, {extra / size:.2f} of query, key and value")
    return {"what": name, "length": length, "extra_bytes": extra, "inputs_bytes": size, "ratio": extra / size}


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        print(peak_memory(sys.argv[2], int(sys.argv[3])))
        return
    rows = [] if "--only-memory" in sys.argv else speed()
    rows += [memory_row(name, length) for name in METHODS for length in (16384, 32768)]
    about = {
        "dtype": str(DTYPE).removeprefix("torch."),
        "heads": "9 query, 3 key-value, width 64",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": processor(),
    }
    rows = [row | about for row in rows]
    if "--only-memory" in sys.argv:
        old = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        rows = [row for row in old if "against" in row] + rows
    if "--record" in sys.argv:
        RESULTS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def processor() -> str:
    """What the kernels use of the processor; one with AMX multiplies bfloat16 matrices several times faster."""
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{amx}"


def speed() -> list[dict]:
    """Times of every method against what is stock."""
    causal = "stock causal SDPA"
    rows = [compare(name, ours(name, 16384), causal, stock, 16384) for name in METHODS]
    for name in ("window 1024", "window 1024, 4 sinks"):
        rows.append(compare(name, ours(name, 32768), causal, stock, 32768, repeats=5))
        masked = stock_with_window(16384, 1024)
        rows.append(compare(name, ours(name, 16384), "stock SDPA, window mask", masked, 16384, repeats=3))
        del masked
    slow = two_score_matrices(8192)
    rows.append(compare("two score matrices", slow, "ours (rerope)", ours("rerope", 8192), 8192, repeats=3))
    return rows


if __name__ == "__main__":
    main()
