"""What there is to look at: the files of a folder or hub id as they are written, or the config of a running model."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.compat import optional_file
from rope_scaling.hf.configs import RECORD_KEY, state_trained_length, text_config
from rope_scaling.hf.loading import load_config, model_source
from rope_scaling.hf.rope_types import type_of
from rope_scaling.hf.save_guard import is_guarded, unwarned


_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "max_position_embeddings")
_TEXT = ("text_config", "decoder", "generator", "text_encoder", "thinker_config", "language_config", "llm_config")
"""Names of the language model's config inside that of a larger model."""
_LARGEST = 16 * 2**20
"""Bytes; the largest config of a real model has well under one megabyte."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, as its files state it, and as Transformers reads it."""

    name: str
    text: dict[str, Any]
    """The part of `config.json` that describes the language model, as written."""
    config: Any
    """What Transformers makes of it; `None` if it refuses."""
    whole: Any = None
    """What Transformers makes of all of `config.json`."""
    refusal: str = ""
    """Why it refuses."""
    guarded: bool = False
    """Whether it was saved so that plain Transformers refuses it; these are the settings before the patch then."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other files by name, those that are there."""

    @property
    def stated(self) -> dict[str, Any]:
        """The RoPE settings that Transformers looks at: `rope_scaling` goes before `rope_parameters`."""
        return _mapping(self.text.get("rope_scaling")) or _mapping(self.text.get("rope_parameters"))

    @property
    def kind(self) -> Any:
        """The type of scaling, as written; `default` without any."""
        return type_of(self.stated)

    @property
    def length(self) -> Any:
        """`max_position_embeddings`, as written."""
        return self.text.get("max_position_embeddings")

    def trained_at(self, length: int) -> Source:
        """The same, as if the config stated a trained length, in tokens.

        Raises:
            RopeScalingError: it was saved patched, or it is an adapter: either records its trained length.
        """
        if not self.text or RECORD_KEY in self.text:
            raise RopeScalingError(
                f"{self.name!r} was trained or saved under a patch, which records the trained length. Leave "
                "`original_max_position_embeddings` out."
            )
        state_trained_length(self.text, length)
        if self.config is not None:
            state_trained_length(self.config, length)
        return self

    def parts(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """By layer type (`""` where all rotate alike): the settings as written, and as Transformers reads them."""
        read = _mapping(getattr(self.config, "rope_parameters", None))
        labels = [label for label, part in read.items() if isinstance(part, dict) and "rope_type" in part]
        if not labels:
            return {"": (self.stated, read or self.stated)}
        written = self.stated
        nested = {label: _mapping(written.get(label)) for label in labels}
        return {label: (nested[label], read[label]) for label in labels}


def read_source(name: str) -> Source:
    """Reads the files of a folder or a hub id.

    Raises:
        RopeScalingError: the place is empty, or a file is not JSON or far too large.
    """
    place = model_source(name) if not _is_adapter(name) else name
    names = ("adapter_config.json", "tokenizer_config.json", "generation_config.json")
    files = {one: content for one in names if (content := _read_json(place, one)) is not None}
    raw = _read_json(place, "config.json")
    if raw is None and "adapter_config.json" not in files:
        raise RopeScalingError(f"{name!r} has neither a `config.json` nor an `adapter_config.json`.")
    if raw is None:
        return Source(name, {}, None, files=files)
    try:
        with unwarned():
            whole = load_config(name)
            config = text_config(whole)
    except (RopeScalingError, RecursionError) as error:
        return Source(name, _section(raw), None, refusal=_refusal(error), files=files)
    return replace(_source(name, _section(raw), config, files), whole=whole)


def source_of(model: Any, config: Any) -> Source:
    """The source of a running model: its config, as `save_pretrained` would write it."""
    return _source(type(model).__name__, config.to_dict(), config, {})


def _source(name: str, text: dict[str, Any], config: Any, files: dict[str, dict[str, Any]]) -> Source:
    record = _mapping(text.get(RECORD_KEY))
    guarded = is_guarded(config) and bool(record)
    if guarded:
        before = _mapping(record.get("pretrained"))
        names = getattr(type(config), "attribute_map", {})  # GPT-J's file has `n_positions`
        written = {names.get(key, key): value for key, value in before.items()}
        text, config = {**text, **written}, type(config).from_dict({**config.to_dict(), **before})
    return Source(name, text, config, guarded=guarded, files=files)


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refusal(error: Exception) -> str:
    """Why a config could not be loaded: what its class says of the value, if it is that."""
    reason = " ".join(str(error.__cause__ or error).split())
    return f"{reason:.400}" if "alidation error" in reason else str(error)


def family_reads(config: Any, key: str) -> bool:
    """Whether the code of a model's family, in the folder of its config class, mentions a key of the config."""
    if config is None:
        return False
    code = _code_of(str(Path(inspect.getfile(type(config))).parent))
    return f'"{key}"' in code or f"'{key}'" in code


@cache
def _code_of(folder: str) -> str:
    files = sorted(Path(folder).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _section(raw: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """The part of a config that has the RoPE settings: that of the language model inside it, or itself."""
    inner = {key: value for key, value in raw.items() if isinstance(value, dict) and depth}
    named = [_section(inner[name], depth - 1) for name in _TEXT if name in inner]
    others = [_section(value, depth - 1) for key, value in inner.items() if key not in _TEXT]
    return next((one for one in (*named, raw, *others) if any(key in one for key in _ROPE_KEYS)), raw)


def _read_json(place: str, name: str) -> dict[str, Any] | None:
    try:
        path = optional_file(place, name)
    except OSError as error:
        raise RopeScalingError(f"Cannot read {name!r} of {place!r}: {str(error).splitlines()[0]}") from error
    if path is None:
        return None
    if Path(path).stat().st_size > _LARGEST:
        raise RopeScalingError(f"{name!r} of {place!r} is larger than {_LARGEST // 2**20} MB, too large for a config.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RopeScalingError(f"{name!r} of {place!r} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RopeScalingError(f"{name!r} of {place!r} must hold a mapping; it holds {type(content).__name__}.")
    return content
