"""Evaluates methods on one loaded model, resumably, and writes rows, curves, a table and a plot."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.documents import Document, Documents
from rope_scaling.eval.methods import CROPPING, UNPATCHED, MethodSpec
from rope_scaling.eval.perplexity import check_static, cropped_nll_curve, nll_curve
from rope_scaling.eval.rows import (
    SCHEMA,
    documents_sha256,
    environment,
    frequencies_sha256,
    measure,
    write_atomically,
    write_rows,
)
from rope_scaling.hf.describe import read_description
from rope_scaling.hf.patch import applied_patch
from rope_scaling.hf.pretrained import RECORD_KEY
from rope_scaling.hf.rotary import rotary_slots


Progress = Callable[[str, int], None]
"""Called with the method's label and the number of tokens just scored."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run measures; two runs with equal settings give equal rows."""

    model: str
    data: str
    lengths: list[int]
    """Lengths in tokens, ascending."""
    trained_length: int
    """Tokens that the model reads as it arrives, `1x`."""
    factor: float
    """Factor that methods are patched with."""
    dtype: str
    device: str
    chunk_size: int = 2048
    """Tokens of a forward call."""
    seed: int = 0


@dataclass(frozen=True)
class Curves:
    """What was measured of one method."""

    label: str
    values: list[np.ndarray]
    """Loss at every position in nats, one array a document, `[T - 1]`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was in effect, read back from the model."""


def check_lengths(lengths: list[int]) -> None:
    """Raises `RopeScalingError` unless lengths are at least 2 tokens and strictly ascending."""
    if not lengths or any(length < 2 for length in lengths):
        raise RopeScalingError(f"`lengths` must be one or more numbers of tokens, at least 2; got {lengths}.")
    if any(later <= earlier for earlier, later in pairwise(lengths)):
        raise RopeScalingError(
            f"`lengths` must be ascending, without repetition; got {lengths}. Give {sorted(set(lengths))}."
        )


def evaluate(
    model: torch.nn.Module,
    documents: Documents,
    methods: list[MethodSpec],
    config: EvaluationConfig,
    output: Path | None = None,
    progress: Progress = lambda label, tokens: None,
) -> tuple[list[dict[str, Any]], list[Curves]]:
    """Measures the unpatched model, the cropping baseline and every method on the same tokens.

    Args:
        model (`nn.Module`): The unpatched model; it is left as it was.
        documents (`Documents`): What `make_documents` gave.
        methods (list of `MethodSpec`): Methods beside the two baselines.
        config (`EvaluationConfig`): Settings, recorded in every row.
        output (`Path`, *optional*): Folder for rows and curves. An unfinished run of the same settings in it
            is resumed at the document where it stopped.
        progress (callable, *optional*): Called after every forward pass over documents.

    Returns:
        Rows as plain data, and the curves they were computed from.

    Raises:
        RopeScalingError: frequencies depend on the length, losses are not finite, or `output` holds another run.
    """
    check_lengths(config.lengths)
    check_static(model)
    slots = rotary_slots(model)
    if applied_patch(slots) is not None or hasattr(slots[0].config, RECORD_KEY):
        raise RopeScalingError(
            "This model is patched, so it cannot be its own baseline. Give the unpatched one (`unpatch(model)`), and "
            "the patch among the methods."
        )
    labels = [UNPATCHED, CROPPING, *(spec.label for spec in methods)]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RopeScalingError(f"Each method may stand in a table once; given twice: {', '.join(sorted(twice))}.")
    for spec in methods:
        # Anything wrong with a method shows before the first is measured.
        with spec.patched(model, config.factor):
            pass
    store = _Store(output, config, documents)
    plain = _measure_curves(model, documents.items, MethodSpec(UNPATCHED, UNPATCHED, {}), config, store, progress)
    cropped = _measure_cropping(model, documents.items, plain, config, store, progress)
    measured = [plain, cropped]
    for spec in methods:
        with spec.patched(model, config.factor):
            measured.append(_measure_curves(model, documents.items, spec, config, store, progress))
    shared = {"schema": SCHEMA, "task": "perplexity", **_settings(config, documents), "versions": environment()}
    rows = [
        {**shared, **curves.facts, **row}
        for curves in measured
        for row in measure(curves.values, plain.values, config.lengths, config.trained_length, config.seed)
    ]
    store.finish(rows)
    return rows, measured


def _measure_curves(
    model: torch.nn.Module,
    items: list[Document],
    spec: MethodSpec,
    config: EvaluationConfig,
    store: _Store,
    progress: Progress,
) -> Curves:
    slot = read_description(model).slots[0]
    facts = {
        "method": spec.label,
        "arguments": spec.arguments if isinstance(spec.method, str) else {"together": spec.label, **spec.arguments},
        "in_effect": slot.method,
        "target_length": slot.target_length,
        "attention_factor": slot.attention_factor,
        "frequencies_sha256": frequencies_sha256(model),
    }

    def score(document: Document) -> torch.Tensor:
        return nll_curve(model, document.ids[None], config.chunk_size)[0]

    values = _score_all(items, store.open(spec.label, facts["frequencies_sha256"]), score, spec.label, progress)
    if frequencies_sha256(model) != facts["frequencies_sha256"]:
        raise RopeScalingError(
            f"The frequencies of {spec.label!r} changed while it was measured; its losses mean nothing."
        )
    return Curves(spec.label, values, facts)


def _measure_cropping(
    model: torch.nn.Module,
    items: list[Document],
    plain: Curves,
    config: EvaluationConfig,
    store: _Store,
    progress: Progress,
) -> Curves:
    facts = {**plain.facts, "method": CROPPING}
    known = {document.sha256: torch.from_numpy(curve) for document, curve in zip(items, plain.values, strict=True)}

    def score(document: Document) -> torch.Tensor:
        return cropped_nll_curve(model, document.ids, known[document.sha256], config.trained_length, config.chunk_size)

    saved = store.open(CROPPING, facts["frequencies_sha256"])
    return Curves(CROPPING, _score_all(items, saved, score, CROPPING, progress), facts)


def _score_all(
    items: list[Document],
    saved: _SavedCurves,
    score: Callable[[Document], torch.Tensor],
    label: str,
    progress: Progress,
) -> list[np.ndarray]:
    for document in items:
        if document.sha256 not in saved.curves:
            curve = score(document).numpy()
            if not np.isfinite(curve).all():
                raise RopeScalingError(
                    f"{label!r} gives losses that are not finite on {document.name!r}: nothing to average."
                )
            saved.curves[document.sha256] = curve
            saved.write()
        progress(label, len(document.ids))
    return [saved.curves[document.sha256] for document in items]


def _settings(config: EvaluationConfig, documents: Documents) -> dict[str, Any]:
    return {
        **vars(config),
        "documents_sha256": documents_sha256(documents),
        "documents_skipped": documents.skipped,
    }


def settings_sha256(config: EvaluationConfig, documents: Documents) -> str:
    """A name for a run: runs of equal settings and versions share it, 8 hexadecimal digits."""
    settings = {**_settings(config, documents), "versions": environment()}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class _SavedCurves:
    """The curves of one method on disk, by hash of the document; rewritten whole and atomically."""

    def __init__(self, path: Path | None):
        self.path = path
        self.curves: dict[str, np.ndarray] = {}
        if path is not None and path.exists():
            with np.load(path) as stored:
                self.curves = dict(stored)

    def write(self) -> None:
        if self.path is not None:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self.curves)  # type: ignore[arg-type]
            write_atomically(self.path, buffer.getvalue())


class _Store:
    """The output folder: settings first, so that no run continues another's; rows only when all of them are there."""

    def __init__(self, folder: Path | None, config: EvaluationConfig, documents: Documents):
        self.folder = folder
        if folder is None:
            return
        # Versions are part of the settings: curves of two versions must not meet in one table.
        hashes = {document.name: document.sha256 for document in documents.items}
        settings = {**_settings(config, documents), "documents": hashes, "versions": environment()}
        recorded = folder / "settings.json"
        if recorded.exists():
            self._compare(json.loads(recorded.read_text(encoding="utf-8")), json.loads(json.dumps(settings)))
        elif folder.exists() and any(folder.iterdir()):
            raise RopeScalingError(
                f"The output folder {str(folder)!r} exists and holds other files. Give a new or empty one."
            )
        try:
            (folder / "curves").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RopeScalingError(f"Cannot make the output folder {str(folder)!r}: {error}") from error
        write_atomically(recorded, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        # `documents` says the same as `documents_sha256`, at length.
        keys = sorted((old.keys() | new.keys()) - {"documents"})
        different = [key for key in keys if old.get(key) != new.get(key)]
        if different:
            changes = ", ".join(f"{key} (there {old.get(key)!r}, now {new.get(key)!r})" for key in different)
            raise RopeScalingError(
                f"The output folder {str(self.folder)!r} holds rows of another run: {changes}. Give another "
                "`--output`."
            )

    def open(self, label: str, frequencies: str) -> _SavedCurves:
        if self.folder is None:
            return _SavedCurves(None)
        safe = "".join(letter if letter.isalnum() or letter in "_=.-" else "+" for letter in label)[:80]
        return _SavedCurves(self.folder / "curves" / f"{safe}-{frequencies}.npz")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        if self.folder is not None:
            write_rows(self.folder / "rows.jsonl", rows)
