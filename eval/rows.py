"""Rows: one JSON object a measurement, with everything needed to trust it. Tables are made from rows alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_scaling.eval.documents import Documents
from rope_scaling.eval.intervals import estimate
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.notation import from_calls


SCHEMA = 1


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("torch", "transformers", "rope-scaling")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def frequencies_sha256(model: torch.nn.Module) -> str:
    """Hash of frequencies and attention factors as they are in the model's modules now, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for slot in rotary_slots(model):
        values = [*slot.inv_freq.double().cpu().tolist(), slot.attention_factor]
        digest.update(np.array(values, dtype="<f8").tobytes())
    return digest.hexdigest()[:16]


def documents_sha256(documents: Documents) -> str:
    """Hash of the tokens of all documents, 16 hexadecimal digits."""
    return hash_of("".join(one.sha256 for one in documents.items).encode())


def hash_of(data: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def position_buckets(lengths: list[int], trained_length: int) -> list[tuple[int, int]]:
    """Half-open-from-below intervals of positions, in tokens: halves of the trained length, then length to length."""
    inner = {trained_length // 2, trained_length}
    edges = sorted({0} | {edge for edge in inner if edge <= lengths[-1]} | set(lengths))
    return list(pairwise(edges))


def measure(
    curves: list[np.ndarray],
    reference: list[np.ndarray],
    lengths: list[int],
    trained_length: int,
    seed: int,
    *,
    cropping: list[np.ndarray] | None = None,
    masks: list[np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Bucket and prefix measurements of one method, paired with the unpatched model on the same tokens.

    A document that ends inside a bucket or prefix stays out of it, so that all positions weigh alike.

    Args:
        curves (list of `np.ndarray`): Curves of the method, one a document, `[T - 1]`.
        reference (list of `np.ndarray`): Those of the unpatched model, of the same lengths.
        lengths (`list[int]`): Lengths of the prefixes, ascending.
        trained_length (`int`): The model's, in tokens.
        seed (`int`): Of the bootstrap.
        cropping (list of `np.ndarray`, *optional*): Those of the cropping baseline, to be paired with too.
        masks (list of `np.ndarray`, *optional*): Which tokens count, one a document, `[T - 1]`; all by default.
    """
    kept = [np.ones(len(curve), dtype=bool) for curve in curves] if masks is None else masks
    spans = [("bucket", *bucket) for bucket in position_buckets(lengths, trained_length)]
    spans += [("prefix", 0, length) for length in lengths]
    rows = []
    for kind, start, end in spans:
        # Entry t of a curve is the loss of the token at position t + 2 when positions count from 1.
        inside = slice(max(start - 1, 0), end - 1)
        chosen = [i for i, curve in enumerate(curves) if len(curve) >= end - 1]
        if not chosen:
            continue
        counts = np.array([kept[i][inside].sum() for i in chosen], dtype=np.float64)
        if not counts.sum():
            continue

        def sums(values: list[np.ndarray], inside: slice = inside, chosen: list[int] = chosen) -> np.ndarray:
            return np.array([values[i][inside][kept[i][inside]].sum(dtype=np.float64) for i in chosen])

        own = sums(curves)
        row = {"measure": kind, "from": start, "to": end, "documents": len(chosen), "tokens": int(counts.sum())}
        row |= estimate(own, counts, seed).fields("nll")
        row |= estimate(own - sums(reference), counts, seed).fields("difference")
        if cropping is not None:
            row |= estimate(own - sums(cropping), counts, seed).fields("to_cropping")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines, all or nothing."""
    write_atomically(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | ({"in_effect": from_calls(row["in_effect"])} if "in_effect" in row else {}) for row in rows]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that an interruption leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
