"""GGUF files of small Llama models, and what llama.cpp computes from the metadata of one, after its own code."""

import gguf
import numpy as np

from references import formulas


def write_llama(model, path):
    """A Llama model in float32 and without a vocabulary, as `convert_hf_to_gguf.py` lays its weights out."""
    config, state = model.config, {name: w.float().numpy() for name, w in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in state.items():
        for part, count in heads.items():
            if part in name:  # halves become neighbours
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """`(frequencies, attention factor, context length)` of a file of a Llama model."""
    reader = gguf.GGUFReader(path)
    values = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    width, base = values["rope.dimension_count"], values["rope.freq_base"]
    kind, factor = values["rope.scaling.type"], values.get("rope.scaling.factor", 1.0)
    found = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    divided = found[0].astype(np.float64) if found else np.ones(width // 2)
    gain = values.get("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        assert not found
        inv_freq, own = formulas.yarn(width, base, values["rope.scaling.original_context_length"], factor)
        return inv_freq, own * gain, values["context_length"]
    assert kind == "linear" or (kind == "none" and factor == 1.0)
    plain = np.array([formulas.theta(i, width, base) for i in formulas.pairs(width)])
    return plain / divided / factor, gain, values["context_length"]
