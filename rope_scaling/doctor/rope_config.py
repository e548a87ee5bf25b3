"""What can be wrong with the RoPE settings that a config states."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from rope_scaling.doctor.findings import NOTE, Finding, found
from rope_scaling.doctor.lengths import check_other_lengths, check_part, check_windows, is_length
from rope_scaling.doctor.sources import Source, family_reads
from rope_scaling.errors import is_number
from rope_scaling.hf.compat import ignored_rope_keys, layers_differ
from rope_scaling.hf.rope_types import known_types, remedy, type_of, with_static_base


_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_NEEDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor"},
    "proportional": set(),
}
_TAKES = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    # The last two are read by vLLM and SGLang in place of `attention_factor`.
    "longrope": {"attention_factor", "factor", "short_mscale", "long_mscale"},
    "proportional": {"factor"},
}
_WITHOUT_EFFECT = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | dict.fromkeys(
    ("factor", "attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim"), 1
)
"""What leaves the frequencies as they are for every reader: defaults written out."""
_BEFORE_BASES = r"4\.([0-9]|[12][0-9]|3[0-2])\."
"""Versions of Transformers in which Llama's config had no base: it was 10000 for every model."""
_DROPS_CACHE = {"phi3", "phimoe", "phi4_multimodal"}
"""Models whose code starts again when a text outgrows the short factors."""


def check_settings(source: Source, target_length: int | None) -> Iterator[Finding]:
    """Everything that the config alone shows."""
    unknown = [*_types(source)]
    yield from unknown
    if source.refusal and not unknown:
        yield found("RS114", source.refusal, "Fix what it names in `config.json`, or update Transformers.")
    yield from _stated_twice(source)
    yield from _layer_types(source)
    for label, (written, read) in source.parts().items():
        read = with_static_base(read, source.config)
        kind, where = type_of(read), _where(label)
        if not isinstance(kind, str) or kind not in _NEEDS:
            continue
        yield from _values(source, kind, where, read)
        yield from _keys(source, kind, where, label, written)
        if kind == "default":
            continue
        yield from _base(source, kind, where, written, read)
        yield from check_part(source, kind, where, written, read)
        yield from _behaviour(source, kind, where, read)
    yield from check_other_lengths(source)
    yield from check_windows(source, target_length)


def _where(label: str) -> str:
    return f" of {label!r} layers" if label else ""


def _types(source: Source) -> Iterator[Finding]:
    for label, (written, read) in source.parts().items():
        kind = type_of(written if source.config is None else read)
        if not isinstance(kind, str) or kind not in known_types():
            yield found(
                "RS105",
                f"The settings{_where(label)} have `rope_type` {kind!r}, which Transformers does not know.",
                remedy(kind),
            )


def _stated_twice(source: Source) -> Iterator[Finding]:
    old, new = source.text.get("rope_scaling"), source.text.get("rope_parameters")
    if isinstance(new, dict):
        new = new.get("full_attention", new)  # whose settings the older form states
    differing = []
    if isinstance(old, dict) and isinstance(new, dict):
        old_kind, new_kind = (type_of(form) for form in (old, new))
        shared = (old.keys() & new.keys()) - {"rope_type", "type"}
        differing += [
            f"`{key}` {old[key]!r} and {new[key]!r}" for key in sorted(shared) if not same(old[key], new[key])
        ]
        differing += [f"`rope_type` {old_kind!r} and {new_kind!r}"] if old_kind != new_kind else []
    for key in ("rope_theta", "partial_rotary_factor"):
        top, inner = source.text.get(key), source.stated.get(key)
        if top is not None and inner is not None and not same(top, inner):
            differing.append(f"`{key}` {top!r} at the top and {inner!r} inside")
    if differing:
        yield found(
            "RS104",
            f"The config states RoPE settings twice, and differently: {'; '.join(differing)}. Which one counts "
            "depends on the reader and its version.",
            "Find out which the weights were trained with, and write it in both places; `rope-scaling export --target "
            "transformers-v4` does.",
        )


def _layer_types(source: Source) -> Iterator[Finding]:
    parts = source.parts()
    kind = source.kind
    if "" in parts or kind == "default" or any(label in source.stated for label in parts):
        return
    if all((read.get("rope_type") or "default") == "default" for _, read in parts.values()):
        yield found(
            "RS108",
            f"The layer types of this model rotate differently ({', '.join(parts)}), and its settings ({kind!r}) are "
            "not stated by layer type: Transformers leaves every layer unscaled.",
            "State them by layer type, or patch the unscaled model: `rope_scaling.patch(model, ...)` scales full "
            "attention only.",
        )


def _base(source: Source, kind: str, where: str, written: dict, read: dict) -> Iterator[Finding]:
    stated = {"rope_theta", "rotary_emb_base"} & {*written, *source.text}
    saved_by = source.text.get("transformers_version")
    if isinstance(saved_by, str) and re.match(_BEFORE_BASES, saved_by):
        return
    if written and not any(written.get(key) or source.text.get(key) for key in stated):
        yield found(
            "RS101",
            f"The config scales{where} by {kind!r} and states no `rope_theta`, neither there nor at the top. "
            f"Transformers takes {read.get('rope_theta', 10000.0)!r}, the default of the model class; a model that "
            "was trained with another base gives wrong outputs.",
            "Copy `rope_theta` from the config of the model that this one was made from.",
        )


def _keys(source: Source, kind: str, where: str, label: str, written: dict) -> Iterator[Finding]:
    own = ignored_rope_keys(source.config)
    known = _ANY | own | _NEEDS[kind] | _TAKES.get(kind, set())
    unread = {
        key
        for key, value in written.items()
        if key not in known and not _without_effect(key, value) and not family_reads(source.config, key)
    }
    if label and written.get("truncate") is False:
        unread.add("truncate")
    if unread:
        hint = " The final factor on cosine and sine is called `attention_factor`." if "attn_factor" in unread else ""
        fix = "Remove them, or spell them as Transformers does; a server that reads them computes something else."
        if kind == "default" and not {"rope_type", "type"} & written.keys():
            fix = "Add the `rope_type` that they belong to; without one nothing is scaled."
        yield found(
            "RS107",
            f"Transformers does not read {', '.join(f'`{key}`' for key in sorted(unread))} for {kind!r}{where}.{hint}",
            fix,
        )


def _without_effect(key: str, value: Any) -> bool:
    # `finetuned` is a remark of YaRN's authors: the frequencies are the same with and without.
    return value is None or key == "finetuned" or (key in _WITHOUT_EFFECT and same(value, _WITHOUT_EFFECT[key]))


def _behaviour(source: Source, kind: str, where: str, read: dict) -> Iterator[Finding]:
    original = read.get("original_max_position_embeddings")
    if kind == "dynamic":
        raised = is_length(original) and is_length(source.length) and source.length > original
        late = f" Nor does it begin before {source.length} tokens, although {original} were trained." if raised else ""
        yield found(
            "RS106",
            "'dynamic' computes other frequencies for every length of the call, while the keys in the cache were "
            "rotated with earlier ones: cached and uncached logits differ, and rows of a batch change each other"
            f"{where}.{late}",
            "Load it with `rope_type` 'default' and use `patch(model, 'dynamic_ntk', factor=...)`, which is exact "
            "under caching, or `ntk` at a fixed length.",
        )
    if kind == "longrope" and read.get("short_factor") != read.get("long_factor"):
        original = original or source.text.get("original_max_position_embeddings")
        resets_cache = (getattr(source.config, "model_type", None) or source.text.get("model_type")) in _DROPS_CACHE
        how = "resets the cache there" if resets_cache else "goes on with keys rotated with the other set"
        yield found(
            "RS109",
            f"One set of factors serves texts up to {original} tokens and another longer ones{where}; a text that "
            f"grows across that length {how}, and the longest row decides for the batch.",
            "Decide by the length of the whole text: `patch(model, 'dynamic_longrope', ...)` switches by position.",
            NOTE if resets_cache else None,
        )
    if kind in ("linear", "yarn") and (read.get("factor") or 1) != 1:
        yield found(
            "RS112",
            f"{kind!r} scales texts of every length{where}, including those within the trained length.",
            "Measure the loss: `rope-scaling evaluate --lengths 1x`. `dynamic_yarn` does not change short texts.",
        )


def _values(source: Source, kind: str, where: str, read: dict) -> Iterator[Finding]:
    wrong = [f"`{key}` is missing" for key in sorted(_NEEDS.get(kind, set())) if read.get(key) is None]
    numbers = {"rope_theta": 0, "factor": 1, "low_freq_factor": 0, "high_freq_factor": 0, "attention_factor": 0}
    for key, least in (numbers | {"beta_fast": 0, "beta_slow": 0, "partial_rotary_factor": 0}).items():
        value = read.get(key)
        if value is not None and not (is_number(value) and value >= least and (value > 0 or key.startswith("beta"))):
            wrong.append(
                f"`{key}` must be a finite number{', at least 1' if least else ' above 0'}; it is {value!r:.60}"
            )
    pairs = _num_pairs(source.config, read)
    for key in ("short_factor", "long_factor"):
        value = read.get(key)
        if value is not None and not (isinstance(value, list) and all(is_number(one) and one > 0 for one in value)):
            wrong.append(f"`{key}` must be a list of finite numbers above 0; it is {value!r:.60}")
        elif value is not None and pairs and len(value) != pairs:
            wrong.append(f"`{key}` must have one number for each of {pairs} pairs; it has {len(value)}")
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        value = source.text.get(key) if key in source.text else read.get(key)
        if value is not None and not is_length(value):
            wrong.append(f"`{key}` must be a whole number of tokens; it is {value!r:.60}")
    low, high = read.get("low_freq_factor"), read.get("high_freq_factor")
    if kind == "llama3" and is_number(low) and is_number(high) and high < low:
        wrong.append(f"`high_freq_factor` {high:g} must be at least `low_freq_factor` {low:g}")
    if wrong:
        yield found("RS110", f"{kind!r}{where}: {'; '.join(wrong)}.", "Correct them in `config.json`.")
    if kind != "default" and source.length is None:
        assumed = getattr(source.config, "max_position_embeddings", None)
        yield found(
            "RS113",
            f"{kind!r}{where}, and the config has no `max_position_embeddings`; Transformers takes {assumed}.",
            "Write the length that the model reads with its scaling.",
        )


def _num_pairs(config: Any, read: dict) -> int:
    """How many pairs of dimensions rotate, as Transformers counts them for every type; 0 where that is not clear."""
    if config is None or layers_differ(config):
        return 0
    heads, share = getattr(config, "num_attention_heads", 0), read.get("partial_rotary_factor") or 1.0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return int(width * share) // 2 if is_number(share) else 0


def same(one: Any, other: Any) -> bool:
    """Whether two values of a config mean the same; computed ones may differ in the last digits of float32."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if is_number(one) and is_number(other):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
