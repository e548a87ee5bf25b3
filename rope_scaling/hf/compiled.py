"""A patched decoder under `torch.compile` where attention is FlexAttention: no graph break.

Reading a call (its documents, their positions, the bounds of spans) needs Python on values of tensors. One operator
does that for all layers that attend alike; a compiler sees it as a call that gives tensors of known shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from rope_scaling.attention.flex import TracedSpans, shapes, tables
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.sequences import KeyStore, read_documents, segment
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.layer_spans import PROGRAMS, SpanProgram


TRACED_DEVICES = {"cuda"}
"""Where attention is FlexAttention."""
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)


@dataclass(frozen=True, eq=False)
class TracedCall:
    """One forward call of a patched decoder, as a graph holds it."""

    kinds: list[TracedSpans]
    kind_of: list[int]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        dropout: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer, `[B, H, T, dv]`."""
        if dropout:
            raise RopeScalingError(
                f"Attention dropout ({dropout}) does not go through FlexAttention, which a compiled model uses on a "
                "GPU. Set the config's `attention_dropout` to 0, or train without `torch.compile`."
            )
        return self.kinds[self.kind_of[layer]].attend(query, key, value, scaling, softcap, sinks)


def traceable(inputs: torch.Tensor, cache: Any, keeps: bool) -> bool:
    """Whether a call can be read into a graph: on a GPU, without a cache or with one of a usual kind.

    A cache that is made in the graph itself cannot: the tracer (torch 2.13) loses what FlexAttention's own tracing
    comes after.
    """
    if inputs.device.type not in TRACED_DEVICES:
        return False
    return not keeps if cache is None else all(type(layer) in _PLAIN for layer in cache.layers)


def trace(
    program: SpanProgram,
    inputs: torch.Tensor,
    cache: Any,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> TracedCall:
    """What `DecoderHook` passes on, of tensors only."""
    past: Any = 0 if cache is None else cache.get_seq_length()
    length = inputs.shape[1]
    seen, cached = (past, 0) if isinstance(past, torch.Tensor) else (None, past)
    names = list(program.kinds)
    kinds = []
    for index, name in enumerate(names):
        kind = program.kinds[name]
        layer = program.kind_of.index(name)
        there = cache is not None and layer < len(cache.layers)
        keys, offset = cache.get_mask_sizes(length, layer) if there else (length, 0)
        sizes = (len(kind.spans), len(kind.inv_freq), keys, offset)
        found = _tables(inputs, position_ids, mask, seen, cached, cache is not None, program.number, index, *sizes)
        has_temperature = kind.temperature is not None
        kinds.append(TracedSpans.made(kind.spans, kind.layout, has_temperature, found))
    return TracedCall(kinds, [names.index(name) for name in program.kind_of])


@torch.library.custom_op("rope_scaling::tables", mutates_args=())
def _tables(
    inputs: torch.Tensor,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    seen: torch.Tensor | None,
    cached: int,
    keeps: bool,
    program: int,
    kind: int,
    spans: int,
    pairs: int,
    keys: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    its = PROGRAMS[program]
    rows, length = inputs.shape[:2]
    documents = read_documents(rows, length, cached if seen is None else int(seen), position_ids, mask)
    its.warn_beyond_reach(max((int(d.positions[-1]) + 1 for d in documents), default=0))
    if keeps and not all(document.contiguous for document in documents):
        raise no_positions_in_a_cache()
    one = list(its.kinds.values())[kind]
    segments = [segment(document, KeyStore(offset)) for document in documents]
    found = tables(Plan(one.spans, segments, one.layout, one.inv_freq, one.temperature), rows, length, keys)
    bounds, queries, of_keys, gains = (tensor.to(inputs.device) for tensor in found)
    return bounds, queries, of_keys, gains


@_tables.register_fake
def _(inputs: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    *_, spans, pairs, keys, _ = others
    rows, length = inputs.shape[:2]
    return tuple(inputs.new_empty(shape, dtype=dtype) for shape, dtype in shapes(spans, pairs, rows, length, keys))


def no_positions_in_a_cache() -> RopeScalingError:
    """The error for documents or skips in a call that fills a cache."""
    return RopeScalingError(
        "`position_ids` restart or skip ahead, and a cache does not hold the positions of its keys. Leave the cache "
        "out, or give one document a row."
    )
