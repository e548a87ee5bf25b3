"""Losses by position before and after training, on the same tokens, as rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from rope_scaling.errors import RopeScalingError, cause_of
from rope_scaling.eval.documents import Document, Documents, documents_sha256
from rope_scaling.eval.files import SCHEMA, write_atomically, write_rows
from rope_scaling.eval.scoring.buckets import measure
from rope_scaling.eval.scoring.identity import environment, frequencies_sha256
from rope_scaling.eval.scoring.nll import nll_curve
from rope_scaling.hf.patch import patch_as_recorded, patch_record, unpatch
from rope_scaling.recipes.checkpoints import saving
from rope_scaling.recipes.config import Recipe
from rope_scaling.recipes.processes import gather, rank


STAGES = ("unpatched", "before", "after")
"""The model without a patch; patched, without training; patched and trained."""


class Measured:
    """The curves of one run, kept on disk so that a resumed run does not measure again."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        documents: Documents,
        lengths: list[int],
        trained: int,
        folder: Path,
        resume: bool,
    ):
        self.recipe, self.name, self.documents, self.lengths = recipe, name, documents, lengths
        self.trained, self.folder, self.resume = trained, folder, resume
        self._curves: dict[str, list[np.ndarray]] = {}
        self._frequencies: dict[str, str] = {}

    def take(self, stage: str, model: Any) -> None:
        """Measures a stage, or reads what was measured before an interruption.

        All processes call it and share the documents. A patch that the model was saved with is taken off for
        "unpatched", and put on again.

        Args:
            stage (`str`): One of `STAGES`.
            model: `None` in processes that hold no weights of their own; the first one always holds some.
        """
        record = patch_record(model) if stage == "unpatched" and model is not None else None
        if record is not None:
            unpatch(model)
        self._take(stage, model)
        if record is not None:
            patch_as_recorded(model, record)

    def _take(self, stage: str, model: Any) -> None:
        known = gather(None if model is None else self._known(stage, model))
        self._frequencies[stage], curves = known[0] or ("", {})
        holders = [index for index, found in enumerate(known) if found is not None]
        missing = [one for one in self.documents.items if one.sha256 not in curves]
        mine = [] if model is None else missing[holders.index(rank()) :: len(holders)]
        for found in gather(self._measure(stage, model, mine)):
            curves |= found
        if not all(np.isfinite(curve).all() for curve in curves.values()):
            raise RopeScalingError(f"The model gives losses that are not finite ({stage}): nothing to compare.")
        self._curves[stage] = [curves[one.sha256] for one in self.documents.items]
        if missing and rank() == 0:
            with saving(self.folder):
                self._write(self._path(stage, self._frequencies[stage]), curves)

    def _known(self, stage: str, model: Any) -> tuple[str, dict[str, np.ndarray]]:
        """A hash of the model's frequencies, and in the first process what was measured with them before."""
        frequencies = frequencies_sha256(model)
        path = self._path(stage, frequencies)
        if rank() > 0 or not self.resume or stage == "after" or not path.exists():
            return frequencies, {}
        with np.load(path) as stored:
            return frequencies, {one.sha256: stored[one.sha256] for one in self.documents.items}

    def _measure(self, stage: str, model: Any, documents: list[Document]) -> dict[str, np.ndarray]:
        if documents:
            model.eval()
        size = self.recipe.evaluation.chunk_size
        try:
            return {one.sha256: nll_curve(model, one.ids[None], size)[0].numpy() for one in documents}
        except Exception as error:
            if (cause := cause_of(error)).kind != "memory":
                raise
            raise RopeScalingError(
                f"Measuring the model ({stage}) ran out of memory: {cause.reason} Give a smaller "
                "`evaluation.chunk_size`, or shorter `evaluation.lengths`."
            ) from error

    def _write(self, path: Path, curves: dict[str, np.ndarray]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **curves)  # type: ignore[arg-type]
        write_atomically(path, buffer.getvalue())

    def _path(self, stage: str, frequencies: str) -> Path:
        return self.folder / "curves" / f"{stage}-{documents_sha256(self.documents)}-{frequencies}.npz"

    def rows(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Every stage against the unpatched model, and the trained one against itself before; written to disk."""
        shared = {
            "schema": SCHEMA,
            "task": "finetune",
            "recipe": self.name,
            "model": self.recipe.model,
            "method": None if (methods := self.recipe.patch.methods) is None else str(methods),
            "factor": self.recipe.patch.factor,
            "layout": self.recipe.data.layout,
            "sequence_length": self.recipe.data.sequence_length,
            "data": self.recipe.evaluation.source,
            "trained_length": self.trained,
            "lengths": self.lengths,
            "documents_sha256": documents_sha256(self.documents),
            "versions": environment(),
            **facts,
        }
        rows = []
        for stage in STAGES:
            for against in ("unpatched", *(("before",) if stage == "after" else ())):
                found = measure(self._curves[stage], self._curves[against], self.lengths, self.trained, seed=0)
                own = {"stage": stage, "against": against, "frequencies_sha256": self._frequencies[stage]}
                rows += [{**shared, **own, **row} for row in found]
        write_rows(self.folder / "rows.jsonl", rows)
        return rows
