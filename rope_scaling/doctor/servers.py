"""What other readers of the same config make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rope_scaling.doctor.findings import NOTE, Finding, found
from rope_scaling.doctor.rope_config import same
from rope_scaling.doctor.sources import Source
from rope_scaling.errors import RopeScalingError
from rope_scaling.exporters.checkpoints import text_overrides
from rope_scaling.exporters.targets import SECTIONS, TARGETS, computes_otherwise
from rope_scaling.hf.checkpoint import Checkpoint
from rope_scaling.hf.configs import rope_parameters_of
from rope_scaling.hf.model_patch import Patch
from rope_scaling.hf.rope_types import with_static_base
from rope_scaling.hf.transformers_v4 import EXPORT_KEY, FULL, SLIDING, V4, stated_in_older_keys


_READ_THE_OLD_FORM = {V4: "Transformers 4", "sglang": "SGLang"}
_IMPLIED = {"original_max_position_embeddings", "attention_factor", "partial_rotary_factor", "rope_theta"}
"""Keys that a reader derives where they are not stated."""
_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def check_servers(
    source: Source, checkpoint: Checkpoint, patch: Patch | None, targets: Sequence[str]
) -> Iterator[Finding]:
    """Findings for every target; those that were not asked for are notes."""
    for target in TARGETS:
        level = None if target in targets else NOTE
        if target == "transformers" or (source.text.get("rope_scaling") is None and not source.stated):
            continue
        try:
            needed = text_overrides(checkpoint, patch, target)
        except RopeScalingError as error:
            yield found("RS303", f"{TARGETS[target]}: {error}", "Serve it with Transformers, or patch again.", level)
            continue
        export = f"`rope-scaling export MODEL --target {target} --out DIR`"
        if target in _READ_THE_OLD_FORM and (unseen := _not_in_old_form(source, needed["rope_parameters"])):
            yield found(
                "RS301",
                f"{_READ_THE_OLD_FORM[target]} did not always read `rope_parameters`, and the older keys do not state "
                f"the {unseen} of this model.",
                f"{export} writes both forms{_kept(source)}.",
                level,
            )
        parameters = needed["rope_parameters"]
        if why := computes_otherwise(parameters.get(FULL, parameters), source.config, target):
            yield found("RS302", why, "Serve it with SGLang or Transformers, or patch the unscaled model.", level)
        elif differing := _differing(source, needed):
            yield found(
                "RS302",
                f"{TARGETS[target]} computes something else from {_kind(source)!r} as the config states it: it needs "
                f"{', '.join(f'`{key}`' for key in differing)} otherwise.",
                f"{export} writes settings that it computes correctly.",
                level,
            )


def _kind(source: Source) -> str:
    return source.stated.get("rope_type") or source.stated.get("type") or "default"


def _differing(source: Source, needed: dict[str, Any]) -> list[str]:
    """Keys that a target needs with other values than the config states."""
    above = {key: source.text.get(key) for key in ("original_max_position_embeddings", "partial_rotary_factor")}
    above |= stated_in_older_keys(source.text, getattr(source.config, "model_type", ""))
    different = []
    for label, (written, read) in source.parts().items():
        kind = read.get("rope_type") or read.get("type") or "default"  # older names of types are read as today's
        stated = with_static_base({**(read if label else {**above, **written}), "rope_type": kind}, source.config)
        stated = {**_DEFAULTS, **stated}
        parameters = needed["rope_parameters"][label] if label else needed["rope_parameters"]
        different += _differing_keys(stated, parameters)
    beside = [key for key in ("llama_4_scaling",) if source.text.get(key) != needed.get(key, source.text.get(key))]
    return [*dict.fromkeys(different), *beside]


def _differing_keys(stated: dict[str, Any], needed: dict[str, Any]) -> list[str]:
    implied = {key for key in _IMPLIED if stated.get(key) is None}
    if needed["rope_type"] == "longrope":
        implied.add("factor")  # it follows from the lengths
    keys = [key for key, value in needed.items() if key not in implied and not same(stated.get(key), value)]
    return ["rope_type"] if "rope_type" in keys else keys  # the others belong to it


def _kept(source: Source) -> str:
    if source.text.get(EXPORT_KEY) != V4:
        return ""
    return (
        ", as it did for this checkpoint before plain Transformers 5 saved it again; save it from "
        "`rope_scaling.from_pretrained` to keep them"
    )


def _not_in_old_form(source: Source, needed: dict[str, Any]) -> str:
    """What a reader of the older keys does not find: scaling, base or rotated share; nothing, if it finds all."""
    family = type(source.config)
    above = stated_in_older_keys(source.text, getattr(family, "model_type", ""))
    default = getattr(family, "default_theta", 10000.0)
    defaults = default if isinstance(default, dict) else {"global": default, "local": 10000.0}
    full = needed.get(FULL, needed)
    stated = {**(source.text.get("rope_scaling") or {}), "rope_theta": above.get("rope_theta", defaults["global"])}
    bases = [(full["rope_theta"], with_static_base(stated, source.config)["rope_theta"])]
    if FULL in needed:
        bases.append((needed[SLIDING]["rope_theta"], above.get("rope_local_base_freq", defaults["local"])))
    missing = [f"base {wanted:g}" for wanted, seen in bases if not same(seen, wanted)]
    if not isinstance(source.text.get("rope_scaling"), dict):
        missing += ["scaling"] if full["rope_type"] != "default" else []
        missing += ["sections"] if SECTIONS in full else []
    share = full.get("partial_rotary_factor")
    if share is not None and not same(above.get("partial_rotary_factor") or _default_share(family), share):
        missing.append(f"rotated share {share:g}")
    return ", ".join(missing)


def _default_share(family: Any) -> float:
    """The part of a head that a family rotates where its config does not say."""
    try:
        return (rope_parameters_of(family()) or {}).get("partial_rotary_factor", 1.0)
    except Exception:  # a config class may want arguments
        return 1.0
