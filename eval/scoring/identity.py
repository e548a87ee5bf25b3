"""What a score was measured with: versions, and hashes of weights, tokenizer and method."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device, has_offloaded_params

from rope_scaling.eval.hashes import digest, hash_of
from rope_scaling.hf.layer_spans import Kind, SpanProgram
from rope_scaling.hf.model_patch import applied_patch
from rope_scaling.hf.patch import patch_record
from rope_scaling.hf.rotary import rotary_slots


_NAMES = ("_name_or_path", "transformers_version", "_commit_hash")
"""What configs hold of names and versions, which change no score."""
_SAMPLED = 2048
"""Positions at which the angles of spans are hashed."""


def environment() -> dict[str, str]:
    """Versions that a score depends on."""
    packages = ("torch", "transformers", "rope-scaling")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of everything that an unpatched model computes with: weights, config, adapters; 16 hexadecimal digits.

    Every byte of every tensor counts, so one training step changes it. Tensors are hashed in parallel; offloaded ones
    are loaded one module at a time.

    Args:
        model (`nn.Module`): A loaded model, unpatched.
    """
    modules = list(model.named_modules())
    offloaded = any(has_offloaded_params(module) for _, module in modules)
    with ThreadPoolExecutor(max_workers=1 if offloaded else None) as pool:
        parts = list(pool.map(lambda item: _module_state(*item), modules))
    settings = [type(model).__name__, *(_settings(model, name) for name in ("config", "generation_config"))]
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return digest(settings, attention, parts)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what a tokenizer does, 16 hexadecimal digits.

    Args:
        tokenizer: One of Transformers, fast or not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    contents = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Padding and truncation are settings of the last call.
    settings = {
        name: value for name, value in contents.items() if backend is None or name not in ("padding", "truncation")
    }
    added = [getattr(tokenizer, name, None) for name in ("special_tokens_map", "add_bos_token", "add_eos_token")]
    return digest(type(tokenizer).__name__, settings, added)


def frequencies_sha256(model: torch.nn.Module) -> str:
    """Hash of frequencies and attention factors as they are in the model's modules now, 16 hexadecimal digits."""
    values = [[*slot.inv_freq.double().cpu().tolist(), slot.attention_factor] for slot in rotary_slots(model)]
    return hash_of(b"".join(np.array(numbers, dtype="<f8").tobytes() for numbers in values))


def method_sha256(model: torch.nn.Module, length: int) -> str:
    """Hash of the patch in effect, 16 hexadecimal digits: its complete record, and what it computes on this model.

    A user's own method has a name and fields, but what it does is code: so frequencies, intervals of keys, angles and
    temperatures are hashed as they are at the positions of a text.

    Args:
        model (`nn.Module`): The model as it is evaluated.
        length (`int`): Tokens of the longest text.
    """
    applied, record = applied_patch(rotary_slots(model)), patch_record(model)
    programs = {} if applied is None else applied.programs
    computed = {path: _program(program, length) for path, program in programs.items()}
    return digest(frequencies_sha256(model), record, computed)


def _settings(model: Any, name: str) -> Any:
    """A config as plain data without names and versions."""
    config = getattr(model, name, None)
    return None if config is None else _without_names(config.to_dict())


def _without_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(key): _without_names(one) for key, one in value.items() if key not in _NAMES}


def _module_state(path: str, module: Any) -> Any:
    """A module's own tensors, hashed, and the state of its adapters."""
    state: dict[str, Any] = {}
    with align_module_device(module):
        module._save_to_state_dict(
            state, "", keep_vars=True
        )  # not recursive, and with the scales of quantized weights
        tensors = {name: _contents(value) for name, value in state.items()}
    adapters = None
    if hasattr(module, "merged_adapters"):  # a layer of PEFT
        names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
        adapters = [getattr(module, name, None) for name in names]
    return [path, tensors, adapters]


def _contents(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return [str(value)]
    if hasattr(value, "__tensor_flatten__"):  # quantized by torchao, or sharded
        names, context = value.__tensor_flatten__()
        return [[_contents(getattr(value, name)) for name in names], str(context)]
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return [str(value.dtype), list(value.shape), hashlib.sha256(data.data).hexdigest()]


def _program(program: Any, length: int) -> Any:
    """What attention does under a patch, for every layer."""
    if not isinstance(program, SpanProgram):
        return None
    hashes = {name: digest(*_kind(kind, length)) for name, kind in program.kinds.items()}
    return [hashes[name] for name in program.kind_of]


def _kind(kind: Kind, length: int) -> Iterator[Any]:
    every = torch.arange(length)
    some = torch.cat([every[:_SAMPLED], torch.linspace(0, length - 1, min(_SAMPLED, length)).long()]).unique()
    yield [_contents(kind.inv_freq), str(kind.layout), kind.retained]
    yield None if kind.temperature is None else _contents(kind.temperature(every))
    for span in kind.spans:
        yield [_contents(bound(every)) for bound in (span.first, span.last)]
        yield [None if angles is None else _contents(angles(some)) for angles in (span.query, span.key)]
        yield None if span.amplitude is None else _contents(span.amplitude)
