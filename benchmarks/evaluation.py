"""What an evaluation costs, in time and memory.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --real     # the model in ROPE_SCALING_REAL_MODEL, in place of the embedded one

Time: the pass at 8x against a bare chunked forward over the same tokens, and against YaRN's protocol for the same
text, 64 prefixes of it, each read from its start; a grid of needles, 4 lengths by 10 depths, in a text a length and in
one text for all, against bare prefills of its lengths, and against one for every cell; of a real model, a pass over
16,384 tokens under methods against the same unpatched. Both sides take turns in one run on one machine; a ratio is of
medians.
Memory: peak resident size of one process for each length, of the evaluation and of one call with all logits, on a
model with a vocabulary of 49,152.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch

import rope_scaling
from rope_scaling.eval.config import EvaluationConfig
from rope_scaling.eval.scoring.answers import Trial, answer_scores
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.eval.tasks import Source
from rope_scaling.eval.tasks.niah import NiahMultikey
from rope_scaling.eval.tasks.niah_nested import NiahNested
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.texts import read_texts


RESULTS = Path(__file__).parent / "results" / "evaluation.jsonl"
CHUNK = 512
LENGTHS = (2048, 4096, 8192)
PASSES = ("self_extend", "angle_clip", "rerope", "dual_chunk", "lm_infinite", "dynamic_yarn")


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if "--real" in sys.argv:
        measured = [
            *niah_grid(os.environ["ROPE_SCALING_REAL_MODEL"], "SmolLM2-135M", 2048, pairs=2),
            *passes_of_a_real_model(),
        ]
    else:
        # Memory first: a process inherits the peak of the one that starts it.
        measured = [*memory(), time_ratio(), yarn_protocol(), *niah_grid("demo", "embedded", 512)]
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


def passes_of_a_real_model(rounds: int = 2) -> list[dict]:
    """An evaluation's pass over 16,384 tokens, stock and under each method in turns."""
    model = load_model(os.environ["ROPE_SCALING_REAL_MODEL"])
    ids = torch.randint(2, 40000, (1, 16384), generator=torch.Generator().manual_seed(0))
    nll_curve(model, ids[:, :4096], 2048)
    times: dict[str, list[float]] = {name: [] for name in ("stock", *PASSES)}
    for number in range(rounds):
        for name in list(times)[:: -1 if number % 2 else 1]:
            with nullcontext() if name == "stock" else rope_scaling.patched(model, name):
                started = time.perf_counter()
                nll_curve(model, ids, 2048)
                times[name].append(1000 * (time.perf_counter() - started))
    return [
        {
            "what": f"whole pass, {name}",
            "tokens": ids.shape[1],
            "chunk_size": 2048,
            "stock_ms": median(times["stock"]),
            "patched_ms": median(times[name]),
            "ratio": median(times[name]) / median(times["stock"]),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        }
        for name in PASSES
    ]


def in_turns(one: Callable[[], object], other: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Medians in milliseconds, after one unmeasured run of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs + 1):
        for run, taken in ((one, times[0]), (other, times[1]))[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - started))
    return median(times[0][1:]), median(times[1][1:])


def eight_times() -> tuple[torch.nn.Module, torch.Tensor]:
    model = load_model("demo")
    shape = (1, 8 * model.config.max_position_embeddings)
    return model, torch.randint(2, 1000, shape, generator=torch.Generator().manual_seed(0))


def time_ratio(pairs: int = 20) -> dict:
    model, ids = eight_times()
    evaluation, bare = in_turns(lambda: nll_curve(model, ids, CHUNK), lambda: bare_forward(model, ids, CHUNK), pairs)
    return {
        "what": "pass at 8x",
        "tokens": ids.shape[1],
        "chunk_size": CHUNK,
        "bare_ms": bare,
        "evaluation_ms": evaluation,
        "ratio": evaluation / bare,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }


def yarn_protocol(pairs: int = 3, points: int = 64) -> dict:
    """The loss at 64 lengths up to 8x, each prefix read by itself and all of them from one pass."""
    model, ids = eight_times()
    ends = [ids.shape[1] * k // points for k in range(1, points + 1)]

    def prefixes() -> None:
        for end in ends:
            nll_curve(model, ids[:, :end], CHUNK)

    protocol, once = in_turns(prefixes, lambda: nll_curve(model, ids, CHUNK), pairs)
    return {
        "what": "YaRN's protocol",
        "tokens": ids.shape[1],
        "points": points,
        "protocol_ms": protocol,
        "pass_ms": once,
        "ratio": protocol / once,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }


def niah_grid(name: str, label: str, chunk: int, pairs: int = 5) -> list[dict]:
    """A needle at each of 10 depths of 4 lengths, against a bare prefill of each length and of each cell."""
    model = load_model(name)
    trained = model.config.max_position_embeddings
    lengths = [512, 1024, 1536, 2048] if name == "demo" else [trained // 4, trained // 2, trained, 2 * trained]
    config = EvaluationConfig(
        model=name,
        data="",
        lengths=lengths,
        trained_length=trained,
        factor=2,
        dtype=str(model.dtype).removeprefix("torch."),
        device="cpu",
    )
    source = Source(lambda: read_texts("python-reference"), load_tokenizer(name))
    grids = {
        f"niah {kind}, {label}": task(trials=1).items(source, config, model)[0]
        for kind, task in (("grid", NiahMultikey), ("nested grid", NiahNested))
    }
    texts = [torch.tensor([prompt.context]) for trial in next(iter(grids.values())) for prompt in trial.prompts]

    def grid(trials: Sequence[Trial]) -> None:
        for trial in trials:
            answer_scores(model, trial.prompts, chunk)

    def prefills(times: int) -> None:
        for text in texts * times:
            bare_forward(model, text, chunk, keep=1)

    rows = []
    for what, trials in grids.items():
        for each, times in (("length", 1), ("cell", 10)) if name == "demo" else (("length", 1),):
            ours, bare = in_turns(partial(grid, trials), partial(prefills, times), pairs)
            rows.append(
                {
                    "what": f"{what}, and a prefill a {each}",
                    "lengths": lengths,
                    "depths": 10,
                    "grid_ms": ours,
                    "prefills_ms": bare,
                    "ratio": ours / bare if each == "length" else bare / ours,
                    "pairs": pairs,
                    "threads": torch.get_num_threads(),
                }
            )
    return rows


@torch.inference_mode()
def bare_forward(model: torch.nn.Module, ids: torch.Tensor, chunk_size: int, keep: int = 0) -> None:
    """Chunks under a cache, with logits of each chunk's last `keep` tokens, 0 meaning all."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for start in range(0, ids.shape[1], chunk_size):
        piece = ids[:, start : start + chunk_size]
        positions = torch.arange(start, start + piece.shape[1])[None]
        model(input_ids=piece, position_ids=positions, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=keep)


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
