"""The work of `rope-scaling export`: a model, patched, as a checkpoint for a server; or the keys that one needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError


def patch_as_asked(
    model: Any,
    method: str | None,
    factor: float | None,
    target_length: int | None,
    original_length: int | None = None,
) -> None:
    """Patches by what stands on the command line.

    Raises:
        RopeScalingError: a factor or length without a method, or as `patch`.
    """
    extent = {
        "factor": factor,
        "target_length": target_length,
        "original_max_position_embeddings": original_length,
    }
    if method is not None:
        importlib.import_module("rope_scaling.eval.methods").patch_by_text(model, method, **extent)
    elif given := [f"--{name.replace('_', '-')}" for name, value in extent.items() if value is not None]:
        names = " and ".join(f"`{name}`" for name in given)
        raise RopeScalingError(f"{names} can only be given with `--method`.")


def run(
    name: str,
    target: str,
    out: Path | None,
    method: str | None,
    factor: float | None,
    target_length: int | None,
    original_length: int | None,
    adapter: str | None,
    dtype: str,
    gguf: Path | None,
) -> None:
    """Writes the folder, or prints the keys; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    from rope_scaling.exporters.checkpoints import config_overrides, export
    from rope_scaling.exporters.targets import TARGETS
    from rope_scaling.hf.loading import load_model, load_skeleton, load_tokenizer

    if adapter is not None and (out is None or method is not None):
        raise RopeScalingError(
            "`--adapter` is merged into the weights, under the patch that it records: give `--out`, and no `--method`."
        )
    if gguf is not None and (target != "llama.cpp" or out is None or adapter is not None):
        raise RopeScalingError(
            "`--gguf` goes with `--target llama.cpp` and a new file as `--out`, without `--adapter`."
        )
    skeleton = out is None or gguf is not None
    # Nothing is computed, so `auto` is what the checkpoint has.
    stored = "stored" if dtype == "auto" else dtype
    model: Any = load_skeleton(name) if skeleton else load_model(name, dtype=stored, device="cpu")
    if adapter is not None:
        from rope_scaling.hf.adapters import load_adapter

        model = load_adapter(adapter, model).merge_and_unload()
    patch_as_asked(model, method, factor, target_length, original_length)
    if out is None:
        print(json.dumps(config_overrides(model, target)))
        return
    if gguf is not None:
        from rope_scaling.exporters.gguf import rewrite_gguf

        file = rewrite_gguf(model, gguf, out)
        print(f"{file}: llama-server -m {file} -c {model.config.max_position_embeddings}")
        return
    folder = export(model, out, target, load_tokenizer(name))
    print(f"{folder}: for {TARGETS[target]}; how to serve it stands in its README.md.")
