"""How servers compute frequencies from an exported `config.json`, each after its own code, from the file alone.

`(frequencies, attention factor, length that is served)`.
"""

import math

from references import formulas


def _width(config, parameters):
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head * parameters.get("partial_rotary_factor", 1.0))


def _longrope(R, b, factors):
    # 1 / (factor * base^(2i/R)), in float32: an overflowing product is a pair that stands still
    products = [factor * b ** (2 * i / R) for i, factor in enumerate(factors)]
    return [0.0 if product > 3.4e38 else 1 / product for product in products]


def transformers_v4(config):
    """Transformers 4.45 to 4.57: `rope_theta` and `rope_scaling` at the top."""
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    kind, b = scaling["rope_type"], config["rope_theta"]
    R = _width(config, config)
    length = config["max_position_embeddings"]
    if kind == "default":
        return [formulas.theta(i, R, b) for i in formulas.pairs(R)], 1.0, length
    factor = scaling.get("factor")
    if kind == "linear":
        return *formulas.linear(R, b, None, factor), length
    if kind == "llama3":
        L = scaling["original_max_position_embeddings"]
        return *formulas.llama3(R, b, L, factor, scaling["low_freq_factor"], scaling["high_freq_factor"]), length
    if kind == "yarn":
        L = scaling.get("original_max_position_embeddings") or length
        inner = formulas.yarn(
            *(R, b, L, factor, scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1),
            truncate=scaling.get("truncate", True),
            attention_factor=scaling.get("attention_factor"),
            mscale=scaling.get("mscale"),
            mscale_all_dim=scaling.get("mscale_all_dim"),
        )
        return *inner, length
    assert kind == "longrope"
    L = config.get("original_max_position_embeddings")
    factor = length / L if L else factor
    gain = scaling.get("attention_factor")
    if gain is None:
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(L or length))
    assert scaling["short_factor"] == scaling["long_factor"]
    return _longrope(R, b, scaling["long_factor"]), gain, length


def vllm(config, old=False):
    """vLLM, with `--max-model-len` at the exported length: now from `rope_parameters`, before from the older keys."""
    parameters = {**(config["rope_scaling"] or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    if not old:
        parameters = config["rope_parameters"]
    kind, b = parameters["rope_type"], parameters["rope_theta"]
    R = _width(config, config if old else parameters)
    length = config["max_position_embeddings"]
    if kind == "default":
        return [formulas.theta(i, R, b) for i in formulas.pairs(R)], 1.0, length
    L = parameters["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        return *formulas.llama3(R, b, L, parameters["factor"], low, high), length
    if kind == "yarn":
        s = parameters["factor"]
        inv_freq, gain = formulas.yarn(R, b, L, s, parameters.get("beta_fast", 32), parameters.get("beta_slow", 1))
        if old:  # it stretches the first length itself, and knows `attn_factor` only
            return inv_freq, gain * parameters.get("attn_factor", 1.0), L * s
        return inv_freq, parameters.get("attention_factor", gain), length
    assert kind == "longrope", "vLLM serves a `linear` model at its factor times the length"
    assert config["original_max_position_embeddings"] == L
    which = "long" if length > L else "short"
    return _longrope(R, b, parameters[f"{which}_factor"]), parameters[f"{which}_mscale"], length


def sglang(config):
    """SGLang: as vLLM before it read `attention_factor`; the length as it stands where the dict has the first."""
    inv_freq, gain, _ = vllm(config, old=True)
    return inv_freq, gain, config["max_position_embeddings"]


def llama_cpp(config):
    """`convert_hf_to_gguf.py`, and what the server makes of it."""
    parameters = config["rope_parameters"]
    kind, b, R = parameters["rope_type"], parameters["rope_theta"], _width(config, parameters)
    length = config["max_position_embeddings"]
    assert kind in ("default", "linear", "yarn", "llama3")
    if kind == "yarn":
        inv_freq, gain = formulas.yarn(R, b, parameters["original_max_position_embeddings"], parameters["factor"])
        assert (parameters.get("beta_fast", 32), parameters.get("beta_slow", 1)) == (32, 1)
        return inv_freq, gain, length
    return transformers_v4(config)


READERS = {
    "transformers-v4": [transformers_v4],
    "vllm": [vllm, lambda config: vllm(config, old=True)],
    "sglang": [sglang],
    "llama.cpp": [llama_cpp],
}
