"""What the engine costs on a GPU: every number beside that of stock attention on the same card, in the same run.

    python benchmarks/gpu.py                 # every measurement, then the tests that need a card: in eight minutes
    python benchmarks/gpu.py --output FILE   # rows elsewhere than benchmarks/results/gpu.jsonl
    python benchmarks/gpu.py --dry-run       # on a CPU in tiny shapes, through twins of the kernels

Rows are written as they come, so a run that is cut short keeps what it had. Times are medians; ours and stock
alternate. Nothing but PyTorch and Transformers is needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import rope_scaling
from rope_scaling import (
    AngleClip,
    DualChunk,
    DynamicYarn,
    LogN,
    ReRope,
    RopeGeometry,
    SelfExtend,
    SlidingWindow,
    default_inv_freq,
)
from rope_scaling.attention.kernels import Kernels, choose_kernels
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.rotation import RotaryLayout
from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.whole_spans import whole_span_attention
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.loading import load_model
from rope_scaling.spans import Rope


HERE = Path(__file__).parent
TESTS = ["tests/attention/test_kernels.py", "tests/hf/test_devices.py", "tests/hf/test_compiled.py"]
TRAINED = 8192
GRAPHED = 10
"""Calls in a CUDA graph."""
SHAPES = {"8b": (32, 8, 128), "smollm2": (9, 3, 64)}
"""Query heads, key-value heads, width of a head."""


class Bench:
    """Shapes, device and rows of one run."""

    def __init__(self, output: Path, dry: bool):
        self.output, self.dry = output, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.scale = 256 if dry else 1
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.start = time.time()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("")

    def length(self, tokens: int) -> int:
        return max(tokens // self.scale, 2)

    def row(self, **values: Any) -> None:
        """Writes a row and prints it."""
        about = {
            "device": "cpu" if self.dry else torch.cuda.get_device_name(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
        }
        with self.output.open("a") as file:
            file.write(json.dumps(values | about, sort_keys=True) + "\n")
        print(f"{time.time() - self.start:6.1f} s  {values}", flush=True)

    def tensors(self, shape: str, length: int, rows: int = 1, queries: int | None = None) -> list[torch.Tensor]:
        heads, key_heads, width = SHAPES[shape]
        torch.manual_seed(0)
        sizes = [(heads, length if queries is None else queries), (key_heads, length), (key_heads, length)]
        return [
            torch.randn(rows, tokens, count, width, device=self.device, dtype=self.dtype).transpose(1, 2)
            for count, tokens in sizes
        ]

    def kernels(self, tensors: list[torch.Tensor], gradients: bool = False) -> Kernels:
        if self.dry:
            sys.path.insert(0, str(HERE.parent / "tests"))
            from attention_twins import TWINS

            return TWINS["cudnn"]
        found = choose_kernels(*tensors, gradients)
        assert found is not None
        return found

    def plan(self, method: Any, shape: str, first: int, length: int, rows: int = 1) -> Plan:
        """The plan of `length - first` queries on top of `first` keys."""
        width = SHAPES[shape][2]
        trained = self.length(TRAINED)
        geometry = RopeGeometry(rotary_dim=width, rope_theta=5e5, original_max_position_embeddings=trained)
        inv_freq = default_inv_freq(geometry)
        positions, keys = torch.arange(first, length), torch.arange(length)
        segment = Segment(slice(0, rows), slice(0, length - first), slice(0, length), positions, keys)
        spans = method.spans(Rope(geometry, inv_freq, trained))
        return Plan(spans, [segment], RotaryLayout(width), inv_freq.float(), device=self.device)

    def alternate(self, calls: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
        """Median milliseconds of each call, run in turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name, call in calls.items():
                self.wait()
                begin = time.perf_counter()
                call()
                self.wait()
                if repeat >= 2:
                    times[name].append(1000 * (time.perf_counter() - begin))
        return {name: statistics.median(values) for name, values in times.items()}

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def stock(self, tensors: list[torch.Tensor], causal: bool = True) -> dict[str, Callable[[], Any]]:
        """Stock attention by PyTorch's choice, and through each of its fused kernels."""
        query, key, value = tensors

        def attend() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=True
            )

        def through(backend: SDPBackend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return attend()

        if self.dry:
            return {"stock": attend}
        return {
            "stock": attend,
            "stock, cuDNN": lambda: through(SDPBackend.CUDNN_ATTENTION),
            "stock, FlashAttention": lambda: through(SDPBackend.FLASH_ATTENTION),
        }


def method_table(bench: Bench) -> dict[str, Any]:
    window = bench.length(4096)
    return {
        "rerope": ReRope(),
        "self_extend": SelfExtend(),
        "angle_clip": AngleClip(),
        "dual_chunk": DualChunk(),
        "dynamic_yarn": DynamicYarn(),
        "sliding_window, 4 sinks": SlidingWindow(window=window, num_sinks=4),
    }


def prefill(bench: Bench) -> None:
    """Attention of one layer over 65,536 tokens."""
    for shape in SHAPES:
        for name, method in method_table(bench).items():
            prefill_row(bench, shape, name, method)


@torch.inference_mode()
def prefill_row(bench: Bench, shape: str, name: str, method: Any) -> None:
    length, width = bench.length(65536), SHAPES[shape][2]
    tensors = bench.tensors(shape, length)
    kernels = bench.kernels(tensors)
    plan = bench.plan(method, shape, 0, length)
    ours = lambda: whole_span_attention(*tensors, plan, width**-0.5, kernels)  # noqa: E731
    times = bench.alternate({"ours": ours, **bench.stock(tensors)}, repeats=5)
    best = min(value for key, value in times.items() if key != "ours")
    share = share_of_pairs(plan, length) if name.startswith("sliding") else 1.0
    bench.row(
        what="prefill",
        method=name,
        shape=shape,
        length=length,
        times_ms=times,
        share_of_causal=share,
        ratio=times["ours"] / (best * share),
        kernels=str(kernels),
    )


def share_of_pairs(plan: Plan, length: int) -> float:
    """Pairs of query and key that the spans cover, over those of causal attention."""
    pairs = sum(
        int((last - first + 1).clamp(min=0).sum())
        for first, last in (plan.segments[0].bounds(span) for span in plan.spans)
    )
    return pairs / (length * (length + 1) / 2)


def decode_attention(bench: Bench) -> None:
    """Attention of one layer for one token on 65,536 cached ones, launched from a CUDA graph."""
    for rows in (1, 8):
        for name in ("rerope", "angle_clip", "dual_chunk", "dynamic_yarn"):
            decode_row(bench, rows, name)


@torch.inference_mode()
def decode_row(bench: Bench, rows: int, name: str) -> None:
    length, shape = bench.length(65536), "8b"
    tensors = bench.tensors(shape, length, rows, queries=1)
    tensors[1:] = [x.contiguous() for x in tensors[1:]]
    kernels = bench.kernels(tensors)
    plan = bench.plan(method_table(bench)[name], shape, length - 1, length, rows)
    rotated = {span.key: torch.randn_like(tensors[1]) for span in plan.spans if span.key is not None}

    def ours() -> torch.Tensor:
        keys = lambda segment, span, key: (rotated[span.key], 0)  # noqa: E731
        return whole_span_attention(*tensors, plan, 0.1, kernels, rotated_keys=keys)

    calls = {"ours": ours, "stock": bench.stock(tensors, causal=False)["stock"]}
    times = bench.alternate({key: graph_of(bench, call) for key, call in calls.items()}, repeats=25)
    times = {key: ms / (1 if bench.dry else GRAPHED) for key, ms in times.items()}
    cached_bytes = sum(x.numel() * x.element_size() for x in tensors[1:])
    bench.row(
        what="decode attention",
        method=name,
        rows=rows,
        context=length,
        times_ms=times,
        terabytes_per_second={key: cached_bytes / ms / 1e9 for key, ms in times.items()},
        ratio=times["ours"] / times["stock"],
    )


def graph_of(bench: Bench, call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a call, many times; on a CPU the call."""
    if bench.dry:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPHED):
            call()
    return graph.replay


def decode_model(bench: Bench) -> None:
    """A token of a model with four layers in the shape of an 8B model, on 65,536 cached ones, launched eagerly."""
    model = layers_of_8b(bench)
    twin = copy.deepcopy(model)
    for index, (rows, method) in enumerate(product((1, 8), (ReRope(), DynamicYarn()))):
        # Other lengths each time: a kernel that plans for every length anew is to be seen doing so.
        length = bench.length(65536 + 64 * index)
        rope_scaling.patch(twin, method)
        decode_model_row(bench, rows, length, method.name, model, twin)
        rope_scaling.unpatch(twin)


@torch.inference_mode()
def decode_model_row(bench: Bench, rows: int, length: int, name: str, model: Any, twin: Any) -> None:
    models = {"ours": twin, "stock": model, "stock, FlashAttention": model}
    caches = {key: filled_cache(bench, model, rows, length) for key in models}
    ids = torch.ones(rows, 1, dtype=torch.long, device=bench.device)

    def token(key: str) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "Flash" in key and not bench.dry else nullcontext():
            models[key](ids, **{CACHE_NAME: caches[key]})

    times = bench.alternate({key: partial(token, key) for key in models}, repeats=20)
    ratio = times["ours"] / min(value for key, value in times.items() if key != "ours")
    bench.row(what="decode, 4 layers", method=name, rows=rows, context=length, times_ms=times, ratio=ratio)


def layers_of_8b(bench: Bench) -> Any:
    heads, key_heads, width = SHAPES["8b"]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=heads * width,
        intermediate_size=64 if bench.dry else 14336,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=bench.length(TRAINED),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=bench.dtype).to(bench.device).eval()


def filled_cache(bench: Bench, model: Any, rows: int, length: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    _, key_heads, width = SHAPES["8b"]
    for layer in cache.layers:
        parts = [torch.randn(rows, key_heads, length, width, device=bench.device, dtype=bench.dtype) for _ in "kv"]
        layer.update(*parts)
    return cache


def training(bench: Bench) -> None:
    """Forward and backward of one layer's attention over 16,384 tokens."""
    for shape in SHAPES:
        training_row(bench, shape)


def training_row(bench: Bench, shape: str) -> None:
    length, width = bench.length(16384), SHAPES[shape][2]
    tensors = [x.detach().requires_grad_() for x in bench.tensors(shape, length)]
    kernels = bench.kernels(tensors, gradients=True)
    grad = torch.randn_like(tensors[0])
    plan = bench.plan(ReRope(), shape, 0, length)
    ours = lambda: whole_span_attention(*tensors, plan, width**-0.5, kernels)  # noqa: E731
    forwards = {"ours": ours, **bench.stock(tensors)}
    calls = {name: partial(step, forward, tensors, grad) for name, forward in forwards.items()}
    times = bench.alternate(calls, repeats=7)
    best = min(value for key, value in times.items() if key != "ours")
    bench.row(
        what="forward and backward",
        method="rerope",
        shape=shape,
        length=length,
        times_ms=times,
        ratio=times["ours"] / best,
        kernels=str(kernels),
    )


def step(forward: Callable[[], torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor) -> None:
    torch.autograd.grad(forward(), tensors, grad)


@torch.inference_mode()
def memory(bench: Bench) -> None:
    """Peak memory of prefill over 131,072 tokens, beyond query, key, value and output."""
    length, shape = bench.length(131072), "8b"
    tensors = bench.tensors(shape, length)
    kernels = bench.kernels(tensors)
    for name in ("rerope", "self_extend", "angle_clip", "dual_chunk"):
        plan = bench.plan(method_table(bench)[name], shape, 0, length)
        if bench.dry:
            whole_span_attention(*tensors, plan, 0.1, kernels)
            continue
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = whole_span_attention(*tensors, plan, 0.1, kernels)
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        sizes = {"key": tensors[1].numel() * 2, "output": out.numel() * 2}
        allowed = sizes["key"] + 2 * sizes["output"]
        bench.row(
            what="prefill memory",
            method=name,
            length=length,
            extra_bytes=extra,
            sizes=sizes,
            allowed_bytes=allowed,
            ratio=extra / allowed,
        )
        del out


def same_answers(bench: Bench) -> None:
    """The embedded model on the card and on the CPU: losses under methods, and the gradients of one training step."""
    ids = torch.randint(2, 200, (1, 700), generator=torch.Generator().manual_seed(0))
    for methods in ([ReRope()], [SelfExtend()], [DualChunk()], [DynamicYarn()], [AngleClip(), LogN()]):
        found = {}
        for device in ("cpu", str(bench.device)):
            model = load_model("demo").float().to(device)
            rope_scaling.patch(model, *methods)
            loss = model(ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            gradients = torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None])
            found[device] = loss.item(), gradients
        (loss, gradients), (other_loss, other) = found["cpu"], found[str(bench.device)]
        name = "+".join(method.name for method in methods)
        bench.row(
            what="embedded model, float32, against the CPU",
            method=name,
            loss=other_loss,
            cpu_loss=loss,
            relative_difference_of_gradients=float((other - gradients).norm() / gradients.norm()),
        )


def first_calls(bench: Bench) -> None:
    """Time of a first call at a length not seen before: whether anything is compiled or planned for it."""
    if bench.dry:
        return
    tensors = bench.tensors("8b", 9000)
    kernels = bench.kernels(tensors)

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
        return whole_span_attention(q, k, v, plan, 0.1, kernels)

    for name, call in (("stock", stock), ("ours", ours)):
        times = []
        for length in (8501, 8602, 8703):
            plan = bench.plan(ReRope(), "8b", 0, length)
            part = [x[:, :, :length] for x in tensors]
            for _ in range(2):
                bench.wait()
                begin = time.perf_counter()
                with torch.inference_mode():
                    call(*part, plan)
                bench.wait()
                times.append(1000 * (time.perf_counter() - begin))
        bench.row(
            what="first and second call at a new length", method=name, lengths=[8501, 8602, 8703], times_ms=times
        )


def run_tests(bench: Bench) -> None:
    """The tests that need a card."""
    if bench.dry:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *TESTS]
    try:
        done = subprocess.run(command, cwd=HERE.parent, timeout=200, capture_output=True, text=True)
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() + "\ncut off after 200 s"
    print(output[-6000:], flush=True)
    bench.row(what="tests", summary=output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.jsonl")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("No CUDA device: torch sees none here. `--dry-run` runs everything on the CPU with tiny shapes.")
    output = Path("/dev/null") if arguments.dry_run else arguments.output
    bench = Bench(output, arguments.dry_run)
    parts = [same_answers, prefill, training, memory, decode_attention, decode_model, first_calls, run_tests]
    for part in parts:
        if arguments.only and part.__name__ not in arguments.only:
            continue
        try:
            part(bench)
        except Exception:
            traceback.print_exc()
            bench.row(what=part.__name__, failed=traceback.format_exc(limit=-1).strip().splitlines()[-1])


if __name__ == "__main__":
    main()
