"""The `rope_type` of a config: what Transformers computes, and what to write in place of other tools' names."""

from __future__ import annotations

from typing import Any

from rope_scaling.errors import RopeScalingError, is_number
from rope_scaling.hf.compat import rope_functions


_REMEDIES = {
    "su": "It is the first name of 'longrope'. Write 'longrope', and the trained length as "
    "`original_max_position_embeddings` inside `rope_scaling` too.",
    "deepseek_yarn": "vLLM and SGLang call DeepSeek's 'yarn' so. Write 'yarn'.",
    "mrope": "Qwen-VL calls 'default' with `mrope_section` so. Write 'default'.",
    "ntk": "Other tools call a larger base so, each with its own formula. Remove the scaling, and use "
    "`rope_scaling.patch(model, 'ntk', factor=...)`.",
    None: "Write the type that the weights were trained with, or remove the scaling if there was none.",
}


def known_types() -> frozenset[str]:
    """The types that Transformers computes, those that a user registered among them."""
    return frozenset({"default", "axial", *rope_functions()})


def type_of(parameters: dict[str, Any]) -> Any:
    """The type that RoPE parameters state; `default` if they state none, whatever was written if they state one."""
    return parameters.get("rope_type", parameters.get("type", "default"))


def remedy(kind: Any) -> str:
    """What to write in place of a type that Transformers does not compute; whole sentences."""
    if (kind is None or isinstance(kind, str)) and kind in _REMEDIES:
        return _REMEDIES[kind]
    allowed = ", ".join(sorted(known_types() - {"axial"}))
    return f"It must be one of {allowed}; a checkpoint for another library needs that library."


def check_types(parameters: Any) -> None:
    """Checks the types of a config's `rope_parameters`, flat or by layer type.

    Raises:
        RopeScalingError: Transformers does not compute one of them.
    """
    if not isinstance(parameters, dict):
        return
    for part in [part for part in parameters.values() if isinstance(part, dict)] or [parameters]:
        kind = type_of(part)
        if not isinstance(kind, str) or kind not in known_types():
            raise RopeScalingError(f"`rope_type` {kind!r} is not a type that Transformers computes. {remedy(kind)}")


def with_static_base(parameters: dict[str, Any], config: Any) -> dict[str, Any]:
    """RoPE parameters with HunYuan's fixed `alpha` written as what it is: another base, for texts of every length.

    HunYuan calls it `dynamic`, but its code computes `rope_theta * alpha^(d / (d - 2))` once, `d` the width of a head.
    Other families do not read `alpha`; their parameters are returned as they are.
    """
    alpha, base = parameters.get("alpha"), parameters.get("rope_theta")
    family = getattr(config, "model_type", None) or ""
    if type_of(parameters) != "dynamic" or not family.startswith("hunyuan"):
        return parameters
    if not (is_number(alpha) and alpha > 0 and is_number(base)):
        return parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    read_by_none = {"alpha", "type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    kept = {key: value for key, value in parameters.items() if key not in read_by_none}
    return {**kept, "rope_type": "default", "rope_theta": base * alpha ** (width / (width - 2))}
