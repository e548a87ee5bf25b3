"""What each target reads of a config's RoPE settings, and computes from it as Transformers does."""

from __future__ import annotations

import math
from typing import Any

from rope_scaling.frequencies.base import yarn_attention_factor
from rope_scaling.frequencies.yarn import Yarn
from rope_scaling.hf.transformers_v4 import V4, read_by_v4, types_read_by_v4


TARGETS = {
    "transformers": "Transformers 5",
    V4: "Transformers 4.43 or later, and 5",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
}
"""What a checkpoint can be written for; llama.cpp reads it through its own `convert_hf_to_gguf.py`."""

_PLAIN_TYPES = {
    "vllm": {"default", "llama3"},
    "sglang": {"default", "llama3"},
    "llama.cpp": {"default", "linear", "llama3"},
}
"""Types that a target computes as Transformers does, whatever their settings. vLLM and SGLang multiply the length of a
`linear` model by its factor once more."""
READ_KEYS = {
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"),
    *("mrope_section", "mrope_interleaved", "llama_4_scaling_beta"),
}
"""Keys of `rope_parameters` that Transformers reads, in its own code or a model's; another reader may read others, so
an export leaves those out."""
SECTIONS = "mrope_section"
QUERY_SCALE = "llama_4_scaling_beta"


def stated_as_it_is(parameters: dict[str, Any], target: str, config: Any) -> bool:
    """Whether a target computes from RoPE parameters what Transformers computes.

    Args:
        parameters (`dict[str, Any]`): One set of `rope_parameters`, of a layer type if these differ.
        target (`str`): As for `config_overrides`, but `transformers`.
        config: The text config of the model, with its family and length.
    """
    kind, family = parameters["rope_type"], config.model_type
    if target == V4:
        return read_by_v4(parameters, family, config.max_position_embeddings)
    if family == "gpt_oss" and kind == "yarn" and target != "llama.cpp":
        return not _unusual({**parameters, "truncate": True})  # servers read it for this family, which is published so
    if family == "gpt_oss" and target == "vllm":
        return False
    if is_latent(config) and target != "llama.cpp":
        return kind == "default" or (kind == "yarn" and not _unusual_latent(parameters))
    if kind == "longrope":
        same = parameters["short_factor"] == parameters["long_factor"] and SECTIONS not in parameters
        factor = parameters.get("attention_factor")
        return same and factor == parameters.get("short_mscale") == parameters.get("long_mscale") is not None
    if kind != "default" and SECTIONS in parameters and target != "llama.cpp":
        return kind == "yarn" and not _unusual(parameters)
    if kind == "linear" and family.startswith("gemma3"):
        return True  # the only families whose length servers leave as it is
    return kind in _PLAIN_TYPES[target] or (kind == "yarn" and not _unusual(parameters))


def computes_otherwise(parameters: dict[str, Any], config: Any, target: str) -> str | None:
    """What a target computes differently from Transformers, whatever its config states; `None` if nothing."""
    family = config.model_type
    if target != "vllm" or SECTIONS not in parameters or family.startswith(("qwen3_vl", "qwen3_5")):
        return None
    if parameters["rope_type"] != "yarn":
        return None
    return (
        f"vLLM (as of 0.32) computes the ramp of 'yarn' for four times the trained length on models with "
        f"`{SECTIONS}` such as {family!r}, so pairs within the ramp rotate faster there than here. It computes 'ntk' "
        "and 'abf' as they are."
    )


def why_not_computed(kind: str, target: str, config: Any) -> str:
    """Why a target does not compute a type, nor `longrope` in its place, and what is nearest."""
    family, reader = config.model_type, TARGETS[target]
    if target == V4:
        types = types_read_by_v4(family)
        fixed = " (this one with the attention factor of its lengths only)" if types[-1] == "longrope" else ""
        return (
            f"Transformers 4 computes only {', '.join(types)}{fixed} for {family!r} models, and this patch needs "
            f"{kind!r}. The nearest that can be exported, of a model without scaling: 'ntk'."
        )
    if family == "gpt_oss":
        return f"{reader} computes {family!r} models with 'yarn' and its own temperature only. Export 'yarn'."
    what = "whose rotation has sections (`mrope_section`)" if not is_latent(config) else "with latent attention"
    return (
        f"{reader} computes 'yarn' with its own temperature, or another base, for models {what}, and this patch needs "
        "a factor for every pair. The nearest that can be exported: 'yarn', or 'ntk' of a model without scaling."
    )


def is_latent(config: Any) -> bool:
    """Whether servers read the scaling of a model as DeepSeek's: multi-head latent attention, but for MiniCPM3's."""
    return getattr(config, "kv_lora_rank", None) is not None and config.model_type != "minicpm3"


def _unusual(yarn: dict[str, Any]) -> bool:
    """Whether YaRN parameters hold more than every server reads alike."""
    stated = yarn.get("attention_factor")
    factor = Yarn(factor=yarn["factor"], mscale=yarn.get("mscale"), mscale_all_dim=yarn.get("mscale_all_dim"))
    live = factor.default_attention_factor() if stated is None else stated
    usual = math.isclose(live, yarn_attention_factor(yarn["factor"]), abs_tol=1e-6)
    return not usual or yarn.get("truncate") is False or bool(yarn.get("mscale") and yarn.get("mscale_all_dim"))


def _unusual_latent(yarn: dict[str, Any]) -> bool:
    """As `_unusual`, for servers' own YaRN of latent attention, which reads `mscale` and `mscale_all_dim`."""
    derived = Yarn(factor=yarn["factor"], mscale=yarn.get("mscale"), mscale_all_dim=yarn.get("mscale_all_dim"))
    stated = yarn.get("attention_factor")
    same = stated is None or math.isclose(stated, derived.default_attention_factor(), abs_tol=1e-6)
    half_stated = bool(yarn.get("mscale")) != bool(yarn.get("mscale_all_dim"))
    return not same or half_stated or yarn.get("truncate") is False
