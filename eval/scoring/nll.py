"""Negative log-likelihood at every position, from one pass over each document.

A causal model with static frequencies gives, in one chunked pass with a key-value cache, the loss that it would have
at every shorter length too. So one pass at 8x the trained length holds the results of 1x, 2x and 4x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.compat import cache_argument
from rope_scaling.hf.configs import rope_parameters_of
from rope_scaling.hf.rotary import rotary_slots


_ROWS_IN_CACHE = 64


@torch.inference_mode()
def nll_curve(model: Any, ids: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, in nats.

    Memory for logits is that of one chunk, whatever the length.

    Args:
        model (`nn.Module`): A causal language model of Transformers.
        ids (`torch.Tensor`): Token ids, `[B, T]`, all rows of one length, BOS included.
        chunk_size (`int`): Tokens of a forward call, all rows together.

    Returns:
        `torch.Tensor`: `[B, T - 1]`, float32, on the CPU; entry `t` belongs to token `t + 1` given tokens `0 .. t`.
    """
    from transformers import DynamicCache

    rows, length = ids.shape
    step = max(chunk_size // rows, 1)
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    losses = []
    for start in range(0, length - 1, step):
        end = min(start + step, length - 1)
        logits = model(
            input_ids=ids[:, start:end],
            position_ids=torch.arange(start, end, device=ids.device)[None].expand(rows, -1),
            use_cache=True,
            **{cache_argument(model): cache},
        ).logits
        targets = ids[:, start + 1 : end + 1]
        losses.append(_cross_entropy(logits.flatten(0, 1), targets.flatten()).view(rows, -1).cpu())
        del logits  # or both chunks' logits would be in memory at once
    return torch.cat(losses, dim=1)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of every row in float32, `[N]`; on a CPU in blocks of rows that fit its cache, which is much faster."""
    size = _ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    blocks = zip(logits.split(size), targets.split(size), strict=True)
    return torch.cat([cross_entropy(block.float(), wanted, reduction="none") for block, wanted in blocks])


def cropped_nll_curve(
    model: torch.nn.Module, ids: torch.Tensor, plain: torch.Tensor, trained_length: int, chunk_size: int
) -> torch.Tensor:
    """The cropping baseline: the same tokens, with the model given only what fits in its trained length.

    Within the trained length this is the plain pass. Beyond it, every token has between half and all of the trained
    length before it.

    Args:
        model (`nn.Module`): The unpatched model.
        ids (`torch.Tensor`): Token ids of one document, `[T]`.
        plain (`torch.Tensor`): Its plain curve, `[T - 1]`.
        trained_length (`int`): Tokens of a window.
        chunk_size (`int`): Tokens of a forward call.

    Returns:
        `torch.Tensor`: `[T - 1]`, float32.
    """
    return windowed_nll_curve(model, ids, plain, trained_length, trained_length - trained_length // 2, chunk_size)


def windowed_nll_curve(
    model: torch.nn.Module, ids: torch.Tensor, plain: torch.Tensor, window: int, stride: int, chunk_size: int
) -> torch.Tensor:
    """A curve whose tokens beyond the first window see no more than a window of tokens.

    Windows start every `stride` tokens, each with the document's first token (the BOS) in front, and of each the last
    `stride` tokens are scored: those have between `window - stride` and `window` tokens before them.

    Args:
        model (`nn.Module`): A causal language model.
        ids (`torch.Tensor`): Token ids of one document, `[T]`.
        plain (`torch.Tensor`): Losses of the uncropped pass, used for tokens of the first window, `[T - 1]`.
        window (`int`): Tokens of a window.
        stride (`int`): Tokens from one window to the next, less than `window`.
        chunk_size (`int`): Tokens of a forward call.

    Returns:
        `torch.Tensor`: `[T - 1]`, float32.
    """
    curve, seen = plain.clone(), window - stride
    starts = list(range(stride, len(ids) - seen, stride))
    full = [start for start in starts if start + window <= len(ids)]
    rows = max(chunk_size // window, 1)
    groups = [full[i : i + rows] for i in range(0, len(full), rows)] + [
        [start] for start in starts if start not in full
    ]
    for group in groups:
        windows = torch.stack([torch.cat([ids[:1], ids[start + 1 : start + window]]) for start in group])
        losses = nll_curve(model, windows, chunk_size)
        for start, loss in zip(group, losses, strict=True):
            curve[start + seen - 1 : start + len(loss)] = loss[seen - 1 :]
    return curve


def check_static(model: torch.nn.Module) -> None:
    """Refuses a model whose frequencies follow the length of the call: one pass cannot measure it.

    Raises:
        RopeScalingError: `dynamic`, or `longrope` with two different lists of factors.
    """
    for slot in rotary_slots(model):
        parameters = slot.part_of(rope_parameters_of(slot.config))
        varies = slot.rope_type == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")
        if "dynamic" in slot.rope_type or varies:
            raise RopeScalingError(
                f"`rope_type` {slot.rope_type!r} of this model changes its frequencies with the length of the "
                "call, while keys in the cache keep the old ones: one pass over a document would measure neither. "
                "Load it with static frequencies (`rope_parameters` with rope_type 'default'), and patch it with a "
                "static method."
            )
