"""S2 attention (LongLoRA) in a Transformers model, through its registry of attention functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.attention import NAME as SPAN_ATTENTION
from rope_scaling.hf.compat import attention_implementation, sdpa_attention_forward, sdpa_mask
from rope_scaling.hf.configs import own_configs
from rope_scaling.hf.rotary import rotary_slots
from rope_scaling.training.s2 import s2_attention


NAME = "rope_scaling_s2"
_GROUP = "rope_scaling_s2_group"
"""Attribute of every attention module: tokens of a group."""
_STOCK = "rope_scaling_s2_stock"
"""Attribute of the decoder: the attention that it had before."""


def use_s2_attention(model: nn.Module, group_size: int) -> nn.Module:
    """Makes a model attend in shifted groups while it trains; in evaluation mode it has full attention as before.

    Padding, packed documents and the model's own windows are kept within the groups.

    Args:
        model (`nn.Module`): A causal language model of Transformers, bare or in PEFT.
        group_size (`int`): Tokens of a group, even; a quarter of the training length in the paper.

    Returns:
        `nn.Module`: the model itself. `remove_s2_attention` takes it back.

    Raises:
        RopeScalingError: a bad group, or a model whose attention is already that of a span method.
    """
    probe = torch.zeros(1, 2, 2, 2)
    s2_attention(probe, probe, probe, group_size)
    decoder = _decoder(model)
    if attention_implementation(decoder.config) == SPAN_ATTENTION:
        raise RopeScalingError(
            "S2 attention cannot be combined with a span method or a temperature: both decide what attention "
            "computes. Patch with a frequency method for this training."
        )
    own_configs(model)
    if not has_s2_attention(decoder):
        setattr(decoder, _STOCK, attention_implementation(decoder.config))
        decoder.register_forward_pre_hook(_check)
        decoder.set_attn_implementation(NAME)
    for layer in _layers(decoder):
        setattr(layer, _GROUP, group_size)
    return model


def remove_s2_attention(model: nn.Module) -> nn.Module:
    """Takes `use_s2_attention` back.

    Raises:
        RopeScalingError: the model does not have S2 attention.
    """
    decoder = _decoder(model)
    if not has_s2_attention(decoder):
        raise RopeScalingError("This model has no S2 attention: there is nothing to revert.")
    own_configs(model)
    if attention_implementation(decoder.config) == NAME:  # or it was set since
        decoder.set_attn_implementation(getattr(decoder, _STOCK))
    delattr(decoder, _STOCK)
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is _check]:
        del decoder._forward_pre_hooks[key]
    for layer in _layers(decoder):
        delattr(layer, _GROUP)
    return model


def has_s2_attention(decoder: nn.Module) -> bool:
    """Whether `use_s2_attention` is in effect on a decoder."""
    return hasattr(decoder, _STOCK)


def _check(decoder: Any, args: Any) -> None:
    now = attention_implementation(decoder.config)
    if decoder.training and now != NAME:
        raise RopeScalingError(
            f"The attention implementation of {type(decoder).__name__} was set to {now!r} after `use_s2_attention`, "
            "which disables S2 attention. Call `remove_s2_attention(model)` first, and `use_s2_attention` again "
            "after the change if you want both."
        )


def _decoder(model: nn.Module) -> Any:
    """The module that holds the rotary module and the layers."""
    return model.get_submodule(rotary_slots(model)[0].decoder)


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    return (module for module in decoder.modules() if hasattr(module, "layer_idx"))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if not module.training:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise RopeScalingError(
            "This model caps its scores or has learned sinks, which S2 attention does not do. Train it with full "
            "attention (`s2_group_size=null`)."
        )
    out = s2_attention(query, key, value, getattr(module, _GROUP), scaling, attention_mask, dropout)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
