"""GGUF files for llama.cpp: one of the same model, rewritten with the scaling of a live one, weights byte for byte."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.exporters.checkpoints import check_exportable
from rope_scaling.exporters.targets import stated_as_it_is
from rope_scaling.geometry import default_inv_freq
from rope_scaling.hf.checkpoint import Checkpoint, read_checkpoint
from rope_scaling.hf.configs import rope_parameters_of
from rope_scaling.hf.model_patch import applied_patch
from rope_scaling.hf.rope_types import with_static_base
from rope_scaling.hf.slot import Slot


_FACTORS = "rope_freqs.weight"
_READ_FACTORS = {
    *(
        "apertus",
        "arcee",
        "cogvlm",
        "deci",
        "exaone",
        "exaone-moe",
        "exaone4",
        "falcon-h1",
        "granite",
        "granitehybrid",
    ),
    *("granitemoe", "llada", "llama", "llama4", "minicpm", "mistral3", "pangu-embedded", "refact", "step35"),
}
"""Architectures whose code in llama.cpp reads a factor for every pair (`LLM_TENSOR_ROPE_FREQS`)."""


def rewrite_gguf(model: nn.Module, source: str | Path, out: str | Path) -> Path:
    """Copies a GGUF file of a model, quantized or not, with the scaling of a live model of the same shape.

    What llama.cpp computes itself (another base, linear, YaRN with its own temperature) is written as metadata;
    anything else as a factor for every pair, which the architectures that llama.cpp builds like Llama read.

    Args:
        model (`nn.Module`): The base model of the file, patched or not. Its weights are not needed.
        source (`str` or `Path`): A GGUF file of it, such as `convert_hf_to_gguf.py` writes, or one from a hub.
        out (`str` or `Path`): The new file.

    Returns:
        `Path`: the new file.

    Raises:
        RopeScalingError: the `gguf` package is missing, the file is none, `out` exists, the file is of another model,
            or llama.cpp cannot compute what the patch does. Nothing is left behind then.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RopeScalingError("Writing GGUF files needs the package gguf: pip install 'rope-scaling[gguf]'.")
    import gguf

    source, out = Path(source), Path(out)
    if out.exists():
        raise RopeScalingError(f"{str(out)!r} exists. Give a new file.")
    checkpoint = read_checkpoint(model)
    check_exportable(checkpoint, applied_patch(checkpoint.slots), "llama.cpp")
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise RopeScalingError(f"{str(source)!r} is not a readable GGUF file: {error}") from error
    architecture = reader.fields["general.architecture"].contents()
    slot = checkpoint.slots[0]
    _check_same_model(reader, architecture, slot)
    values, factors = _scaling(checkpoint, slot, architecture)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.part")
    try:
        _write(gguf, reader, staging, architecture, values, factors)
        staging.rename(out)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    return out


def _check_same_model(reader: Any, architecture: str, slot: Slot) -> None:
    config = slot.config
    # The rotary width may be left out where it is that of a head.
    wanted = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "rope.dimension_count": 2 * len(slot.inv_freq),
    }
    stated = {key: reader.fields.get(f"{architecture}.{key}") for key in wanted}
    different = [
        f"`{key}` there {field.contents()}, here {wanted[key]}"
        for key, field in stated.items()
        if field is not None and field.contents() != wanted[key]
    ]
    if different:
        raise RopeScalingError(f"The GGUF file is of another model: {'; '.join(different)}.")


def _scaling(checkpoint: Checkpoint, slot: Slot, architecture: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Metadata below the architecture's name, and the factors that its frequencies are divided by, `[R / 2]`."""
    parameters = with_static_base(rope_parameters_of(slot.config), slot.config)
    kind, base = parameters["rope_type"], float(parameters["rope_theta"])
    values: dict[str, Any] = {"context_length": slot.config.max_position_embeddings, "rope.freq_base": base}
    if kind in ("default", "linear", "yarn") and stated_as_it_is(parameters, "llama.cpp", slot.config):
        values["rope.scaling.type"] = "none" if kind == "default" else kind
        if kind != "default":
            values["rope.scaling.factor"] = float(parameters["factor"])
        if kind == "yarn":
            values["rope.scaling.original_context_length"] = parameters["original_max_position_embeddings"]
        return values, None
    if architecture not in _READ_FACTORS:
        raise RopeScalingError(
            f"{kind!r} needs a factor for every pair here, which llama.cpp does not read for {architecture!r} models. "
            "The nearest that can be exported: 'yarn', or 'ntk'."
        )
    pretrained = checkpoint.rope(slot)
    plain, live = default_inv_freq(pretrained.geometry).double(), slot.inv_freq.detach().double().cpu()
    factors = torch.where(live.abs() > 1e-30, plain / live, math.inf).clamp(max=1e30)
    values |= {"rope.freq_base": pretrained.geometry.rope_theta, "rope.scaling.type": "none"}
    if slot.attention_factor != 1.0:
        values["rope.scaling.attn_factor"] = slot.attention_factor
    return values, factors.float().numpy()


def _write(gguf: Any, reader: Any, path: Path, architecture: str, values: dict[str, Any], factors: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture, endianess=reader.endianess)
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    ours = {f"{architecture}.{key}": value for key, value in values.items()}
    for field in reader.fields.values():
        replaced = field.name in ours or field.name.startswith(f"{architecture}.rope.scal")
        if not (replaced or field.name == "general.architecture" or field.name.startswith("GGUF.")):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    for name, value in ours.items():
        writer.add_key_value(name, value, kinds[type(value)])
    tensors = [tensor for tensor in reader.tensors if tensor.name != _FACTORS]
    if factors is not None:
        writer.add_tensor_info(_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
