"""What each choice in cutting spans gains: prefill of 16,384 tokens with the choice as it is and without, in turns.

    python benchmarks/levers.py             # 2 minutes on two cores that do nothing else
    python benchmarks/levers.py --record    # also rewrites benchmarks/results/levers.jsonl

Shapes are those of `benchmarks/attention.py`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from attention import compare, ours, processor

from rope_scaling.attention import schedule


RESULTS = Path(__file__).parent / "results" / "levers.jsonl"
LENGTH = 16384
LEVERS = [
    ("tiles of 2112 queries", "rerope", "TILE", 1056),
    ("tiles of 2112 queries", "rerope", "TILE", 4224),
    ("bands in cuts of 192", "window 1024", "CUTS", ((math.inf, 64),)),
    ("bands in cuts of 192", "window 1024", "CUTS", ((math.inf, 256),)),
    ("bands in cuts of 192", "window 1024", "CUTS", ((math.inf, 1024),)),
    ("cuts by the band's width", "angle_clip, uniform", "CUTS", ((math.inf, 192),)),
    ("chains in tiles of 2304", "angle_clip, uniform", "CHAIN_TILE", 4608),
]


def with_setting(attend: Callable, name: str, value: object) -> Callable:
    """The same call while a constant of the schedule has another value."""

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        kept = getattr(schedule, name)
        setattr(schedule, name, value)
        try:
            return attend(*inputs)
        finally:
            setattr(schedule, name, kept)

    return call


def main() -> None:
    rows = []
    for what, method, name, value in LEVERS:
        without = with_setting(ours(method, LENGTH), name, value)
        otherwise = value[0][1] if isinstance(value, tuple) else value
        row = compare(what, ours(method, LENGTH), f"{name} = {otherwise}", without, LENGTH, repeats=7)
        rows.append(row | {"method": method})
    for method in ("self_extend", "window 1024"):
        afresh = compare(
            "cut and turned once",
            ours(method, LENGTH),
            "afresh in every layer",
            lambda *inputs, method=method: ours(method, LENGTH)(*inputs),
            LENGTH,
            repeats=7,
        )
        rows.append(afresh | {"method": method})
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": processor()}
    if "--record" in sys.argv:
        RESULTS.write_text("".join(json.dumps(row | about, sort_keys=True) + "\n" for row in rows))


if __name__ == "__main__":
    main()
