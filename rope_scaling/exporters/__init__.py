"""Checkpoints and GGUF files for servers that compute RoPE themselves."""
