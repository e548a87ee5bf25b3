"""The loss of a Transformers model, computed in chunks of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.modeling_outputs import CausalLMOutputWithPast

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.training.loss import chunked_cross_entropy


_INSTALLED = "_rope_scaling_forward"


def use_chunked_loss(model: nn.Module, chunk_size: int = 512) -> nn.Module:
    """Makes `model(input_ids, labels=...)` compute its loss in chunks; without labels nothing changes.

    Works with full fine-tuning, PEFT (an adapted head too), DDP and FSDP, as it goes through the model's own
    `forward`. In training the output then holds the loss and no logits. Whether the loss is the model's own, with
    every scale and cap that it puts on its logits, is tried on four tokens first.

    Args:
        model (`nn.Module`): A causal language model of Transformers, bare or in PEFT.
        chunk_size (`int`): Tokens whose logits are in memory at once.

    Returns:
        `nn.Module`: the model itself. `remove_chunked_loss` takes it back.

    Raises:
        RopeScalingError: the model has no separate decoder and head, or computes its loss in another way.
    """
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise RopeScalingError(f"`chunk_size` must be a whole number of tokens, at least 1; got {chunk_size!r}.")
    causal = _causal_model(model)
    if hasattr(causal, _INSTALLED):
        remove_chunked_loss(model)
    stock = causal.forward
    forward = _chunked_forward(causal, stock, chunk_size)
    _check_same_loss(causal, stock, forward)
    setattr(causal, _INSTALLED, stock)
    causal.forward = MethodType(forward, causal)
    return model


def remove_chunked_loss(model: nn.Module) -> nn.Module:
    """Takes `use_chunked_loss` back.

    Raises:
        RopeScalingError: the loss is not chunked.
    """
    causal = _causal_model(model)
    if not hasattr(causal, _INSTALLED):
        raise RopeScalingError("The loss of this model is not chunked: there is nothing to revert.")
    del causal.forward
    if getattr(causal.forward, "__func__", None) is not getattr(getattr(causal, _INSTALLED), "__func__", None):
        causal.forward = getattr(causal, _INSTALLED)  # which somebody else had put there
    delattr(causal, _INSTALLED)
    return model


def _causal_model(model: Any) -> Any:
    """The Transformers model inside a PEFT or compiled one."""
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if inner is not None and hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None:
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        if decoder is not None and decoder is not inner:
            return inner
    raise RopeScalingError(
        f"`{type(model).__name__}` has no separate decoder and language-model head, so its loss cannot be chunked. "
        "Give a causal language model, or train with `chunk_size=null`."
    )


def _chunked_forward(causal: Any, stock: Callable, chunk_size: int) -> Callable:
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    # The names of the arguments have to be the model's: the Trainer drops columns that it does not find there.
    @functools.wraps(getattr(stock, "__func__", stock))
    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        shift_labels: Any = kwargs.get("shift_labels")
        if labels is None and shift_labels is None:
            return stock(*args, **kwargs)
        loss_arguments = {name: kwargs.pop(name, None) for name in ("shift_labels", "num_items_in_batch")}
        ignore_index = kwargs.pop("ignore_index", -100)
        kwargs.pop("logits_to_keep", None)
        outputs = self.get_decoder()(*args, **kwargs)
        if shift_labels is None:
            shift_labels = pad(cast(torch.Tensor, labels), (0, 1), value=ignore_index)[..., 1:]

        def logits_of(hidden: torch.Tensor) -> torch.Tensor:
            logits = self.get_output_embeddings()(hidden)
            logits = logits * scale if scale != 1.0 else logits
            return logits if cap is None else torch.tanh(logits / cap) * cap

        loss = chunked_cross_entropy(
            outputs.last_hidden_state,
            logits_of,
            shift_labels,
            num_items_in_batch=loss_arguments["num_items_in_batch"],
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
        return CausalLMOutputWithPast(loss=loss, **{CACHE_NAME: getattr(outputs, CACHE_NAME, None)})

    return forward


@torch.no_grad()
def _check_same_loss(causal: Any, stock: Callable, forward: Callable) -> None:
    if next(causal.parameters()).is_meta:
        return
    device = causal.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device)[None] % causal.config.get_text_config().vocab_size
    training = causal.training
    causal.eval()
    try:
        wanted = stock(input_ids=ids, labels=ids, use_cache=False).loss
        found = forward(causal, input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        causal.train(training)
    if not torch.allclose(found.float(), wanted.float(), rtol=2e-2 if wanted.dtype != torch.float32 else 1e-4):
        raise RopeScalingError(
            f"`{type(causal).__name__}` computes its loss differently: {float(wanted):.5f} nats on four "
            f"tokens, {float(found):.5f} from its head's logits. Train it with its own loss (`chunk_size=null`)."
        )
