"""What can be wrong with the RoPE settings that a config states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from rope_scaling.errors import is_number
from rope_scaling.hf.doctor.findings import NOTE, Finding, found
from rope_scaling.hf.doctor.sources import Source
from rope_scaling.hf.pretrained import windows_of


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
    # The last two are read by vLLM and SGLang in the place of `attention_factor`.
    "longrope": {"attention_factor", "factor", "short_mscale", "long_mscale"},
    "proportional": {"factor"},
}
_SCALED_TO_A_LENGTH = {"yarn", "llama3", "longrope"}
_DROPS_CACHE = {"phi3", "phimoe", "phi4_multimodal"}
"""Models whose code starts anew when a text outgrows the short factors."""


def check_settings(source: Source, target_length: int | None) -> Iterator[Finding]:
    """Everything that the config alone shows."""
    if source.refusal:
        yield found("RS114", source.refusal, "Mend what it names in `config.json`, or update Transformers.")
    yield from _stated_twice(source)
    yield from _layer_types(source)
    for label, (written, read) in source.parts().items():
        kind = read.get("rope_type") or read.get("type") or "default"
        where = f" of {label!r} layers" if label else ""
        if kind not in _NEEDS and source.config is not None and not _known_to_host(kind):
            yield found(
                "RS105",
                f"The settings{where} have `rope_type` {kind!r}, which Transformers does not know.",
                f"It must be one of {', '.join(sorted(_NEEDS))}; a checkpoint for another library needs that library.",
            )
            continue
        yield from _values(source, kind, where, read)
        if kind == "default":
            continue
        yield from _base(source, kind, where, written, read)
        yield from _lengths(source, kind, where, written, read)
        yield from _keys(source, kind, where, label, written)
        yield from _behaviour(source, kind, where, read)
    yield from _windows(source, target_length)


def _known_to_host(kind: str) -> bool:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return kind in {*ROPE_INIT_FUNCTIONS, "axial"}


def _stated_twice(source: Source) -> Iterator[Finding]:
    old, new = source.text.get("rope_scaling"), source.text.get("rope_parameters")
    if isinstance(new, dict):
        new = new.get("full_attention", new)  # whose settings the older form states
    differing = []
    if isinstance(old, dict) and isinstance(new, dict):
        old_kind, new_kind = (form.get("rope_type", form.get("type")) for form in (old, new))
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
    kind = source.stated.get("rope_type") or source.stated.get("type") or "default"
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
    if written and not any(written.get(key) or source.text.get(key) for key in stated):
        yield found(
            "RS101",
            f"The config scales{where} by {kind!r} and states no `rope_theta`, neither there nor at the top. "
            f"Transformers takes {read.get('rope_theta', 10000.0)!r}, the default of the model class; a model that "
            "was trained with another base is ruined.",
            "Copy `rope_theta` from the config of the model that this one was made from.",
        )


def _lengths(source: Source, kind: str, where: str, written: dict, read: dict) -> Iterator[Finding]:
    length, original, factor = source.length, read.get("original_max_position_embeddings"), read.get("factor")
    if not _is_length(length):
        return
    if kind in _SCALED_TO_A_LENGTH:
        stated = written.get("original_max_position_embeddings"), source.text.get("original_max_position_embeddings")
        if written and not any(stated):
            yield found(
                "RS102",
                f"{kind!r}{where} without `original_max_position_embeddings`: Transformers takes "
                f"`max_position_embeddings`, {length}, for the length that the model was trained at. If that is the "
                "extended length already, every frequency is wrong.",
                "Write the trained length there: the `max_position_embeddings` of the model before it was scaled.",
            )
            return
    if not _is_length(original) or not isinstance(factor, (int, float)) or isinstance(factor, bool):
        return
    if kind in ("yarn", "longrope") and abs(original * factor - length) > 1 and factor > 1:
        equal = " The length was not raised with the factor, so tools that go by it stop at the trained length."
        yield found(
            "RS103",
            f"`original_max_position_embeddings` {original} times `factor` {factor:g} is {original * factor:g}, but "
            f"`max_position_embeddings` is {length}{where}.{equal if length == original else ''}",
            f"Set `max_position_embeddings` to {original * factor:g}, or `factor` to {length / original:g}, whichever "
            "the model was trained with.",
        )
    if kind == "llama3" and original >= length:
        yield found(
            "RS103",
            f"`original_max_position_embeddings` {original} is not below `max_position_embeddings` {length}{where}: "
            "'llama3' scales from the first to the second.",
            "Set them to the lengths before and after the scaling.",
        )


def _keys(source: Source, kind: str, where: str, label: str, written: dict) -> Iterator[Finding]:
    own = set(getattr(source.config, "ignore_keys_at_rope_validation", None) or ())
    unread = written.keys() - _ANY - own - _NEEDS.get(kind, set()) - _TAKES.get(kind, set())
    if kind not in _NEEDS:
        return
    if label and written.get("truncate") is False:
        unread.add("truncate")
    if unread:
        hint = " The final factor on cosine and sine is called `attention_factor`." if "attn_factor" in unread else ""
        yield found(
            "RS107",
            f"Transformers does not read {', '.join(f'`{key}`' for key in sorted(unread))} for {kind!r}{where}.{hint}",
            "Take them out, or spell them as Transformers does; a server that reads them computes something else.",
        )


def _behaviour(source: Source, kind: str, where: str, read: dict) -> Iterator[Finding]:
    original = read.get("original_max_position_embeddings")
    if kind == "dynamic":
        raised = _is_length(original) and _is_length(source.length) and source.length > original
        late = f" Nor does it begin before {source.length} tokens, although {original} were trained." if raised else ""
        yield found(
            "RS106",
            "'dynamic' computes other frequencies for every length of the call, while the keys in the cache were "
            "turned by earlier ones: cached and uncached logits differ, and rows of a batch change each other"
            f"{where}.{late}",
            "Load it with `rope_type` 'default' and use `patch(model, 'dynamic_ntk', factor=...)`, which is exact "
            "under caching, or `ntk` at a fixed length.",
        )
    if kind == "longrope" and read.get("short_factor") != read.get("long_factor"):
        starts_anew = getattr(source.config, "model_type", "") in _DROPS_CACHE
        how = "starts the cache anew there" if starts_anew else "goes on with keys turned by the other set"
        yield found(
            "RS109",
            f"One set of factors serves texts up to {original} tokens and another longer ones{where}; a text that "
            f"grows across that length {how}, and the longest row decides for the batch.",
            "Decide by the length of the whole text: `patch(model, 'dynamic_longrope', ...)` switches by position.",
            NOTE if starts_anew else None,
        )
    if kind in ("linear", "yarn") and (read.get("factor") or 1) != 1:
        yield found(
            "RS112",
            f"{kind!r} scales texts of every length{where}, those within the trained length too.",
            "Measure what that costs: `rope-scaling evaluate --lengths 1x`. `dynamic_yarn` leaves short texts alone.",
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
    for key in ("short_factor", "long_factor"):
        value = read.get(key)
        if value is not None and not (isinstance(value, list) and all(is_number(one) and one > 0 for one in value)):
            wrong.append(f"`{key}` must be a list of finite numbers above 0; it is {value!r:.60}")
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        value = source.text.get(key) if key in source.text else read.get(key)
        if value is not None and not _is_length(value):
            wrong.append(f"`{key}` must be a whole number of tokens; it is {value!r:.60}")
    low, high = read.get("low_freq_factor"), read.get("high_freq_factor")
    if kind == "llama3" and is_number(low) and is_number(high) and high <= low:
        wrong.append(f"`high_freq_factor` {high:g} must be above `low_freq_factor` {low:g}")
    if wrong:
        yield found("RS110", f"{kind!r}{where}: {'; '.join(wrong)}.", "Correct them in `config.json`.")
    if kind != "default" and source.length is None:
        assumed = getattr(source.config, "max_position_embeddings", None)
        yield found(
            "RS113",
            f"{kind!r}{where}, and the config has no `max_position_embeddings`; Transformers takes {assumed}.",
            "Write the length that the model reads with its scaling.",
        )


def _windows(source: Source, target_length: int | None) -> Iterator[Finding]:
    length = target_length or source.length
    if source.config is None or not _is_length(length):
        return
    windows = windows_of(source.config)
    short = [window for window in windows if window and window < length]
    kinds = getattr(source.config, "layer_types", None)
    limited = len(short) if kinds is None else sum("sliding" in str(kind) for kind in kinds) if short else 0
    if limited and limited == len(windows):
        yield found(
            "RS111",
            f"Every layer attends to the last {max(short)} tokens only, so none sees {length} tokens at once, "
            "whatever its frequencies.",
            "State the policy yourself: a larger `sliding_window` (the model was not trained with one), or none of "
            "the long text will be read but through the window.",
        )


def same(one: Any, other: Any) -> bool:
    """Whether two values of a config mean the same; computed ones may differ in the last digits of float32."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if is_number(one) and is_number(other):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
