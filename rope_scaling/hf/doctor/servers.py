"""What other readers of the same config make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.doctor.findings import NOTE, Finding, found
from rope_scaling.hf.doctor.settings import same
from rope_scaling.hf.doctor.sources import Source
from rope_scaling.hf.export import TARGETS, config_overrides
from rope_scaling.hf.older_keys import EXPORT_KEY, V4
from rope_scaling.hf.rope_types import with_static_base


_READ_THE_OLD_FORM = {"transformers-v4": "Transformers 4", "sglang": "SGLang"}


def check_servers(source: Source, model: Any, targets: Sequence[str]) -> Iterator[Finding]:
    """Findings for every target; those that were not asked for are notes."""
    for target in TARGETS:
        level = None if target in targets else NOTE
        if target == "transformers" or (source.text.get("rope_scaling") is None and not source.stated):
            continue
        try:
            needed = config_overrides(model, target)["rope_parameters"]
        except RopeScalingError as error:
            yield found("RS303", f"{TARGETS[target]}: {error}", "Serve it with Transformers, or patch anew.", level)
            continue
        if target in _READ_THE_OLD_FORM and not _old_form(source, needed):
            yield found(
                "RS301",
                f"The settings stand in `rope_parameters` only, a key that {_READ_THE_OLD_FORM[target]} did not "
                f"always read: it takes base 10000 then, in the place of {needed['rope_theta']:g}, and no scaling.",
                f"`rope-scaling export MODEL --target {target} --out DIR` writes both forms{_kept(source)}.",
                level,
            )
        stated = {"rope_theta": source.text.get("rope_theta"), "rope_type": "default", **source.stated}
        stated["rope_type"] = source.stated.get("rope_type") or source.stated.get("type") or "default"
        stated = with_static_base(stated, source.config)
        differing = [key for key, value in needed.items() if value is not None and not same(stated.get(key), value)]
        implied = {"original_max_position_embeddings", "attention_factor", "partial_rotary_factor", "rope_theta"}
        if stated["rope_type"] != needed["rope_type"] or set(differing) - implied:
            yield found(
                "RS302",
                f"{TARGETS[target]} computes other frequencies, another factor or another length from "
                f"{stated['rope_type']!r} as it stands here.",
                f"`rope-scaling export MODEL --target {target} --out DIR` writes what it computes rightly.",
                level,
            )


def _kept(source: Source) -> str:
    if source.text.get(EXPORT_KEY) != V4:
        return ""
    return (
        ", as it did for this checkpoint before plain Transformers 5 saved it again; save it from "
        "`rope_scaling.from_pretrained` to keep them"
    )


def _old_form(source: Source, needed: dict[str, Any]) -> bool:
    plain = needed["rope_type"] == "default"
    base = source.text.get("rope_theta")
    if plain and base is None:
        return needed["rope_theta"] == 10000.0
    return base is not None and (plain or isinstance(source.text.get("rope_scaling"), dict))
