"""How other readers compute frequencies from an exported `config.json`, each after its own code, from the file alone.

Read in Transformers 4.57.3, vLLM 0.11 to 0.32 and SGLang 0.5.23. Every reader returns
`(frequencies, attention factor, length that is served)`.
"""

import math

from references import formulas


SHARES = {"gpt_neox": 0.25, "stablelm": 0.25, "phi": 0.5, "glm": 0.5, "nemotron": 0.5, "persimmon": 0.5}
"""Of a head that is rotated where a config class of Transformers 4 does not find it."""


def _width(config, parameters):
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        return config["qk_rope_head_dim"]
    return int(head * (parameters.get("partial_rotary_factor") or 1.0))


def _default(R, b):
    return [formulas.theta(i, R, b) for i in formulas.pairs(R)], 1.0


def _longrope(R, b, factors):
    # 1 / (factor * base^(2i/R)), in float32: an overflowing product is a pair that does not rotate
    products = [factor * b ** (2 * i / R) for i, factor in enumerate(factors)]
    return [0.0 if product > 3.4e38 else 1 / product for product in products]


def _get_mscale(s, m=1.0):
    return 0.1 * m * math.log(s) + 1.0 if s > 1 else 1.0


def _checked_by_v4(family, scaling):
    """What config classes of Transformers 4 accept, and what model classes do with it."""
    if family == "nemotron":
        return {"rope_type": "default"}
    if scaling is None:
        return {"rope_type": "default"}
    if family == "olmo":
        assert set(scaling) == {"type", "factor"} and scaling["type"] in ("linear", "dynamic")
        assert isinstance(scaling["factor"], float)
    if family == "phi3":
        assert set(scaling) == {"type", "short_factor", "long_factor"} and scaling["type"] == "longrope"
    if family == "llama4_text":
        return {**scaling, "rope_type": "llama3"}
    return scaling


def transformers_v4(config):
    """Transformers 4.45 to 4.57: `rope_theta` and `rope_scaling` at the top, or a family's own names."""
    family = config["model_type"]
    scaling = _checked_by_v4(family, config["rope_scaling"])
    kind = scaling.get("rope_type", scaling.get("type"))
    own = family == "gpt_neox"
    b = config.get("rotary_emb_base" if own else "rope_theta", 10000.0)
    share = config.get("rotary_pct" if own else "partial_rotary_factor", SHARES.get(family, 1.0))
    R = _width(config, {"partial_rotary_factor": share})
    length = config["max_position_embeddings"]
    if kind == "default":
        return *_default(R, b), length
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


def _latent(parameters, R, b, L):
    """YaRN of servers for latent attention, which both take for every type but `default`."""
    s = parameters["factor"]
    inv_freq, _ = formulas.yarn(R, b, L, s, parameters.get("beta_fast", 32), parameters.get("beta_slow", 1))
    assert parameters.get("attention_factor") is None, "vLLM may take this for a softmax without `mscale_all_dim`"
    return inv_freq, _get_mscale(s, parameters.get("mscale", 1)) / _get_mscale(s, parameters.get("mscale_all_dim", 0))


def _server(config, parameters, old=False, sglang=False):
    """Frequencies and attention factor; `old` and SGLang know no `attention_factor`."""
    kind, b, family = parameters["rope_type"], parameters["rope_theta"], config["model_type"]
    R = _width(config, parameters)
    if family == "gpt_oss" and not sglang:
        parameters = {key: parameters[key] for key in ("factor", "original_max_position_embeddings", *_OF_GPT_OSS)}
        kind = "yarn"
    if kind == "default":
        return _default(R, b)
    L = parameters.get("original_max_position_embeddings")
    if config.get("kv_lora_rank"):
        return _latent(parameters, R, b, L)
    if kind == "llama3":
        assert "mrope_section" not in parameters, "rotates by one axis"
        return formulas.llama3(R, b, L, *(parameters[k] for k in ("factor", "low_freq_factor", "high_freq_factor")))
    if kind == "yarn":
        if "mrope_section" in parameters and not sglang and family != "qwen3_vl_text":
            L *= 4  # of the table for long videos
        betas = parameters.get("beta_fast", 32), parameters.get("beta_slow", 1)
        truncate = parameters.get("truncate", True) if family == "gpt_oss" else True
        inv_freq, gain = formulas.yarn(R, b, L, parameters["factor"], *betas, truncate=truncate)
        if old or sglang or family == "gpt_oss":
            assert not (sglang and "mscale" in parameters)
            return inv_freq, gain * parameters.get("attn_factor", 1.0)
        return inv_freq, parameters.get("attention_factor", gain)
    if kind == "linear" and family == "gemma3_text":
        return formulas.linear(R, b, None, parameters["factor"])
    assert kind == "longrope", "both serve a `linear` model at its factor times the length"
    assert "mrope_section" not in parameters, "rotates by one axis"
    length = config["max_position_embeddings"]
    which = "long" if length > L else "short"
    return _longrope(R, b, parameters[f"{which}_factor"]), parameters[f"{which}_mscale"]


_OF_GPT_OSS = ("beta_fast", "beta_slow", "truncate")


def _by_transformers_5(config):
    """`rope_parameters` as Transformers 5 reads them for a server: `rope_scaling` goes first, keys at the top last."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    for name, other in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if parameters.get(name) is None and (above := config.get(name, config.get(other))) is not None:
            parameters[name] = above
    return parameters


def vllm(config):
    """vLLM from 0.24 on, with `--max-model-len` at the exported length."""
    parameters = _by_transformers_5(config)
    if parameters["rope_type"] == "longrope":
        assert config["original_max_position_embeddings"] == parameters["original_max_position_embeddings"]
    return *_server(config, parameters), config["max_position_embeddings"]


def older_vllm(config):
    """vLLM before: the older keys, in a config of Transformers 4; `yarn` at its factor times the first length."""
    parameters = {**(config["rope_scaling"] or {"rope_type": "default"}), "rope_theta": config["rope_theta"]}
    if config["model_type"] == "gpt_neox":
        parameters |= {"rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"]}
    length = config["max_position_embeddings"]
    if parameters["rope_type"] == "yarn":
        length = parameters["original_max_position_embeddings"] * parameters["factor"]
    return *_server(config, parameters, old=True), length


def sglang(config):
    """SGLang: the length as it is where the dict has the first."""
    return *_server(config, _by_transformers_5(config), sglang=True), config["max_position_embeddings"]


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
    "vllm": [vllm, older_vllm],
    "sglang": [sglang],
    "llama.cpp": [llama_cpp],
}


def of_layer_type(config, layer_type):
    """The config as if all layers of Gemma 3 were of one type, in both forms."""
    sliding = layer_type == "sliding_attention"
    parameters = config["rope_parameters"][layer_type]
    older = {"rope_theta": config["rope_local_base_freq"], "rope_scaling": None} if sliding else {}
    if not sliding and config["rope_scaling"] is not None:
        # Transformers 5 puts it into the settings of full attention.
        assert {**parameters, **config["rope_scaling"]} == parameters
    return {**config, **older, "rope_parameters": parameters}


def sections(config):
    """The pairs that each axis rotates, after either form of the settings."""
    both = [config.get(form) or {} for form in ("rope_scaling", "rope_parameters")]
    assert both[0].get("mrope_section") == both[1].get("mrope_section")
    return both[0].get("mrope_section")


def query_scale(config, position):
    """vLLM's multiplier of a query of Ministral 3, from a key at the top."""
    scaling = config.get("llama_4_scaling")
    if scaling is None:
        return 1.0
    return 1 + scaling["beta"] * math.log(1 + position // scaling["original_max_position_embeddings"])


def overridden(config, overrides, target):
    """What a server computes from a config object of Transformers 5 after `--hf-overrides` (vLLM) or
    `--json-model-override-args` (SGLang), which reach it one after the other."""
    (_override_vllm if target == "vllm" else _override_sglang)(config, overrides)
    text = config.get_text_config()
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **(text.rope_parameters or {})}
    return *_server(text.to_dict(), parameters, sglang=target == "sglang"), text.max_position_embeddings


def _override_vllm(config, overrides):
    # plain values first; mappings replace what is at the top, and are merged below it
    config.update({key: value for key, value in overrides.items() if not isinstance(value, dict)})
    for key, value in overrides.items():
        if isinstance(value, dict):
            inner = getattr(config, key, None)
            _merge(inner, value) if hasattr(inner, "to_dict") else setattr(config, key, value)


def _merge(target, values):
    for key, value in values.items():
        inner = target.get(key) if isinstance(target, dict) else getattr(target, key, None)
        if isinstance(value, dict) and (isinstance(inner, dict) or hasattr(inner, "__dict__")):
            _merge(inner, value)
        elif isinstance(target, dict):
            target[key] = value
        else:
            setattr(target, key, value)


def _override_sglang(config, overrides):
    for key, value in overrides.items():
        inner = getattr(config, key, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            inner.update(value)
        elif key in ("rope_scaling", "rope_parameters") and isinstance(value, dict) and isinstance(inner, dict):
            setattr(config, key, {**inner, **value})
        else:
            config.update({key: value})
