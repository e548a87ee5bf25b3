"""The configs of public checkpoints, written small: keys and values of rotary embeddings as published."""

SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MLA = {
    **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
LONG, SHORT = [1.0 + index for index in range(16)], [1.0] * 16
VISION = {
    **{"model_type": "qwen2_5_vl", "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    **{"out_hidden_size": 64, "patch_size": 14, "fullatt_block_indexes": [0], "rope_theta": 3.0},
}
HUNYUAN = {
    **SIZES,
    **{"model_type": "hunyuan_v1_dense", "head_dim": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0},
    "rope_scaling": {
        **{"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "type": "dynamic",
    },
}
SCOUT = {
    **SIZES,
    **{"model_type": "llama4_text", "num_hidden_layers": 4, "head_dim": 32, "intermediate_size_mlp": 64},
    **{"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 8192},
    **{"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1},
    **{"max_position_embeddings": 10485760, "rope_theta": 500000.0},
    "rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0},
}
GEMMA3 = {
    **{"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 1024, "max_position_embeddings": 131072},
    **{"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2},
}
QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 32,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "sliding_window": None,
}
QWEN25 = {
    **{"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0},
    **{"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28},
}
YARN_CARD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# checkpoint: config beside the sizes
RIGHT = {
    "Llama-2-7b": {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": None},
    "Llama-3.1-8B": {
        **{"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 500000.0},
        "rope_scaling": {**LLAMA3, "factor": 8.0, "rope_type": "llama3"},
    },
    "Llama-3.2-1B": {
        **{"model_type": "llama", "head_dim": 32, "max_position_embeddings": 131072, "rope_theta": 500000.0},
        "rope_scaling": {**LLAMA3, "factor": 32.0, "rope_type": "llama3"},
    },
    "Llama-4-Scout-17B-16E": SCOUT,
    "Yarn-Llama-2-7b-64k": {
        **{"model_type": "llama", "max_position_embeddings": 65536, "rope_theta": 10000.0},
        "rope_scaling": {
            **{"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
        },
    },
    "deepseek-coder-6.7b": {
        **{"model_type": "llama", "max_position_embeddings": 16384, "rope_theta": 100000},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "vicuna-7b-v1.5": {"model_type": "llama", "max_position_embeddings": 4096, "transformers_version": "4.30.1"},
    "Qwen2.5-7B-Instruct": QWEN25,
    "Qwen3-8B": QWEN3,
    "Qwen3-8B, YaRN with its length": {
        **QWEN3,
        "max_position_embeddings": 131072,
        "rope_scaling": {**YARN_CARD, "rope_type": "yarn"},
    },
    "Qwen2.5-VL-7B, YaRN as its card says": {
        **{"model_type": "qwen2_5_vl", "vision_config": VISION, "max_position_embeddings": 128000},
        **{"rope_theta": 1000000.0, "use_sliding_window": False},
        "rope_scaling": {**YARN_CARD, "mrope_section": [4, 6, 6]},
    },
    "Qwen3.8, YaRN on sections": {
        **{"model_type": "qwen3_vl_text", "head_dim": 32, "max_position_embeddings": 1048576, "rope_theta": 1e7},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144},
            **{"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
    },
    "Mistral-7B-v0.1": {
        **{"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096},
    },
    "Mistral-7B-v0.3": {
        **{"model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
    },
    "Ministral-3-8B": {
        **{"model_type": "ministral3", "head_dim": 32, "max_position_embeddings": 262144, "sliding_window": None},
        "rope_parameters": {
            **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
            **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0},
            **{"rope_type": "yarn", "type": "yarn"},
        },
    },
    "Phi-3-mini-4k": {
        **{"model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        **{"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047},
    },
    "Phi-3.5-mini": {
        **{"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
        **{"rope_theta": 10000.0, "sliding_window": 262144},
        "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
    },
    "Phi-4-mini": {
        **{"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
        **{"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "sliding_window": 262144},
        "rope_scaling": {"type": "longrope", "long_factor": LONG[:12], "short_factor": SHORT[:12]},
    },
    "Phi-3.5-MoE": {
        **{"model_type": "phimoe", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
        **{"rope_theta": 10000.0, "sliding_window": 131072, "num_local_experts": 2},
        "rope_scaling": {
            **{"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
            **{"long_mscale": 1.2, "short_mscale": 1.2, "original_max_position_embeddings": 4096},
        },
    },
    "phi-2": {
        **{"model_type": "phi", "max_position_embeddings": 2048, "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    },
    "gemma-2-9b": {
        **{"model_type": "gemma2", "head_dim": 32, "max_position_embeddings": 8192, "rope_theta": 10000.0},
        "sliding_window": 4096,
    },
    "gemma-3-4b, text": {**GEMMA3, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "gemma-3-1b": {**GEMMA3, "max_position_embeddings": 32768},
    "gemma-4": {
        **{"model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 64, "sliding_window": 512},
        **{"max_position_embeddings": 131072, "layer_types": ["sliding_attention", "full_attention"]},
        **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    },
    "DeepSeek-V2-Lite": {
        **MLA,
        **{"model_type": "deepseek_v2", "max_position_embeddings": 163840, "rope_theta": 10000},
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
            **{"original_max_position_embeddings": 4096, "type": "yarn"},
        },
    },
    "DeepSeek-V3": {
        **MLA,
        **{"model_type": "deepseek_v3", "max_position_embeddings": 163840, "rope_theta": 10000},
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
            **{"original_max_position_embeddings": 4096, "type": "yarn"},
        },
    },
    "Kimi-K2": {
        **MLA,
        **{"model_type": "deepseek_v3", "max_position_embeddings": 131072, "rope_theta": 50000.0},
        "rope_scaling": {
            **{"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            **{"original_max_position_embeddings": 4096, "type": "yarn"},
        },
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "head_dim": 32, "max_position_embeddings": 131072, "rope_theta": 150000},
        **{"sliding_window": 128, "num_local_experts": 2, "num_experts_per_tok": 1, "initial_context_length": 4096},
        "rope_scaling": {
            **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
            **{"rope_type": "yarn", "truncate": False},
        },
    },
    "SmolLM3-3B": {
        **{"model_type": "smollm3", "max_position_embeddings": 65536, "rope_theta": 5000000.0, "rope_scaling": None},
        **{"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "use_sliding_window": False},
    },
    "c4ai-command-a": {
        **{"model_type": "cohere2", "max_position_embeddings": 131072, "rope_theta": 50000, "sliding_window": 4096},
        **{"layer_types": ["sliding_attention", "full_attention"]},
    },
    "EXAONE-4.0": {
        **{"model_type": "exaone4", "head_dim": 32, "max_position_embeddings": 131072, "rope_theta": 1000000},
        **{"sliding_window": 4096, "sliding_window_pattern": 2},
        "rope_scaling": {**LLAMA3, "rope_type": "llama3", "factor": 16.0},
    },
    "Olmo-3-7B": {
        **{"model_type": "olmo3", "max_position_embeddings": 65536, "rope_theta": 500000, "sliding_window": 4096},
        **{"layer_types": ["sliding_attention", "full_attention"]},
        "rope_scaling": {
            **{"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "yarn"},
        },
    },
    "Apertus-8B": {
        **{"model_type": "apertus", "max_position_embeddings": 65536, "rope_theta": 12000000},
        "rope_scaling": {**LLAMA3, "rope_type": "llama3", "type": "llama3", "factor": 8.0},
    },
    "Hunyuan-7B": HUNYUAN,
    "glm-4-9b-hf": {
        **{"model_type": "glm", "head_dim": 32, "max_position_embeddings": 131072, "rope_theta": 10000.0},
        "partial_rotary_factor": 0.5,
    },
    "GLM-4-9B-0414": {
        **{"model_type": "glm4", "head_dim": 32, "max_position_embeddings": 32768, "rope_theta": 10000.0},
        "partial_rotary_factor": 0.5,
    },
    "falcon-7b": {
        **{"model_type": "falcon", "alibi": False, "multi_query": True, "rope_scaling": None, "rope_theta": 10000.0},
    },
    "mpt-7b": {
        **{"model_type": "mpt", "d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 2048},
        "attn_config": {"alibi": True},
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 1024, "n_ctx": 1024, "n_embd": 64, "n_head": 2, "n_layer": 2},
    "bert-base": {"model_type": "bert", "max_position_embeddings": 512},
    "pythia-1.4b": {
        **{"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    },
    "ModernBERT-base": {
        **{"model_type": "modernbert", "max_position_embeddings": 8192, "global_rope_theta": 160000.0},
        **{"local_rope_theta": 10000.0, "local_attention": 128, "global_attn_every_n_layers": 2},
    },
    "musicgen-small": {
        "model_type": "musicgen",
        "text_encoder": {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {"model_type": "musicgen_decoder", "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32},
    },
    "llava-1.5-7b": {
        "model_type": "llava",
        "vision_config": {
            **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "image_size": 28},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14},
        },
        "text_config": {**SIZES, "model_type": "llama", "max_position_embeddings": 4096},
    },
    "pixtral-12b": {
        "model_type": "llava",
        "vision_config": {
            **{"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "image_size": 28, "head_dim": 16},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "rope_theta": 10000.0},
        },
        "text_config": {
            **{**SIZES, "model_type": "mistral", "max_position_embeddings": 1024000, "rope_theta": 1000000000.0},
            "sliding_window": None,
        },
    },
}  # fmt: skip

# checkpoint: (config beside the sizes, codes beside notes, what the findings say)
WRONG = {
    "Phi-3-mini-128k as first published": (
        {**RIGHT["Phi-3.5-mini"], "rope_scaling": {"type": "su", "long_factor": LONG, "short_factor": SHORT}},
        {"RS105"},
        "Write 'longrope'",
    ),
    "Qwen2.5-7B, YaRN as its card says": ({**QWEN25, "rope_scaling": YARN_CARD}, {"RS103"}, "to 131072."),
    "Qwen3-8B, YaRN as its card says": ({**QWEN3, "rope_scaling": YARN_CARD}, {"RS103"}, "to 131072, or"),
    "Qwen2.5-7B-Instruct-1M": (
        {
            **QWEN25,
            "max_position_embeddings": 1010000,
            "dual_chunk_attention_config": {
                **{"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144},
            },
        },
        {"RS116"},
        "'dual_chunk', original_max_position_embeddings=262144, target_length=1010000",
    ),
    "c4ai-command-r-v01": (
        {
            **{"model_type": "cohere", "max_position_embeddings": 8192, "model_max_length": 131072},
            **{"rope_theta": 8000000.0, "logit_scale": 0.0625},
        },
        {"RS115"},
        "set `max_position_embeddings` to 131072",
    ),
    "LongAlpaca-7B": (
        {
            **{"model_type": "llama", "max_position_embeddings": 4096, "rope_theta": 10000.0},
            "rope_scaling": {"factor": 8.0, "type": "linear"},
        },
        {"RS115"},
        "original_max_position_embeddings=4096",
    ),
    "vicuna-7b-v1.5-16k": (
        {
            **{"model_type": "llama", "max_position_embeddings": 4096, "max_sequence_length": 16384},
            **{"rope_scaling": {"factor": 4.0, "type": "linear"}, "transformers_version": "4.31.0"},
        },
        {"RS115"},
        "Set `max_position_embeddings` to 16384",
    ),
    "nomic-embed-text-v1": (
        {
            **{"model_type": "nomic_bert", "n_positions": 8192, "max_position_embeddings": 8192},
            **{"max_trained_positions": 2048, "rotary_emb_base": 1000, "rotary_scaling_factor": 2},
        },
        {"RS116"},
        "trained at `max_trained_positions` 2048",
    ),
    "DeepSeek-R1-0528-Qwen3-8B": (
        {
            **QWEN3,
            "max_position_embeddings": 131072,
            "rope_scaling": {**YARN_CARD, "rope_type": "yarn", "attn_factor": 0.8782488562869419},
        },
        {"RS107"},
        "is called `attention_factor`",
    ),
    "internlm2_5, as Llama": (
        {
            **{"model_type": "llama", "max_position_embeddings": 32768, "rope_theta": 1000000},
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        {"RS106"},
        "dynamic_ntk",
    ),
    "alpha in a family that does not read it": (
        {**HUNYUAN, "model_type": "llama"},
        {"RS106", "RS107"},
        "does not read `alpha` for 'dynamic'",
    ),
}  # fmt: skip
