"""The work of `rope-scaling export`: a model, patched, as a checkpoint for a server; or the keys that one needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rope_scaling.cli.options import patch_by_options
from rope_scaling.errors import RopeScalingError


def run(
    name: str,
    target: str,
    *,
    out: Path | None,
    method: str | None,
    factor: float | None,
    target_length: int | str | None,
    original_length: int | None,
    adapter: str | None,
    dtype: str,
    gguf: Path | None,
) -> None:
    """Writes the folder, or prints the keys; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can fix.
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
    patch_by_options(model, method, factor, target_length, original_length)
    if out is None:
        print(json.dumps(config_overrides(model, target)))
        return
    if gguf is not None:
        from rope_scaling.exporters.gguf import rewrite_gguf

        file = rewrite_gguf(model, gguf, out)
        print(f"{file}: llama-server -m {file} -c {model.config.max_position_embeddings}")
        return
    folder = export(model, out, target, load_tokenizer(name))
    print(f"{folder}: for {TARGETS[target]}; its README.md says how to serve it.")
