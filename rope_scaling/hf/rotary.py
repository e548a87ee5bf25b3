"""The rotary modules of a loaded model."""

from __future__ import annotations

from torch import nn

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.sinusoidal_tables import table_slots
from rope_scaling.hf.slot import Slot, decoder_around


def rotary_slots(model: nn.Module) -> list[Slot]:
    """Every set of rotary frequencies in a model's text decoder.

    Raises:
        RopeScalingError: `model` is not a module, or has no rotary module that Transformers would build.
    """
    if not isinstance(model, nn.Module):
        raise RopeScalingError(
            f"`model` must be a loaded model, such as `AutoModelForCausalLM.from_pretrained(...)` returns; "
            f"got {type(model).__name__}."
        )
    slots: list[Slot] = [*table_slots(model)]
    for path, module in model.named_modules():
        # Other libraries put subclasses with names of their own in place of a module's class.
        name = next((cls.__name__ for cls in type(module).__mro__ if "RotaryEmbedding" in cls.__name__), "")
        if name and not {"Vision", "Audio"} & set(_words(name)) and hasattr(module, "rope_type"):
            layer_types = sorted(module.rope_type) if isinstance(module.rope_type, dict) else [None]
            slots += [Slot(path, module, layer_type, decoder_around(model, path)) for layer_type in layer_types]
    if not slots:
        raise RopeScalingError(
            f"{type(model).__name__} has no rotary position embedding that can be scaled: no module was touched. "
            "It takes a model whose rotary module Transformers builds from `config.rope_parameters`, such as Llama, "
            f"Mistral, Qwen, Phi, Gemma or GPT-NeoX.{_advice_on_custom_code(model)}"
        )
    return slots


def _advice_on_custom_code(model: nn.Module) -> str:
    if not hasattr(model, "config") or type(model).__module__.startswith("transformers."):
        return ""
    return (
        " Its code is not Transformers' own. If Transformers has this architecture, load it without "
        "`trust_remote_code`; else build its frequencies as `LlamaRotaryEmbedding` does, under a class named so."
    )


def _words(name: str) -> list[str]:
    return "".join(f" {letter}" if letter.isupper() else letter for letter in name).split()
