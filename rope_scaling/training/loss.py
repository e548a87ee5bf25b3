"""Cross-entropy without the logits of a whole sequence in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    shift_labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_size: int = 512,
) -> torch.Tensor:
    """Cross-entropy in float32 over chunks of tokens, each of whose logits are computed, used and dropped.

    Backward computes them once more, so that no more than one chunk of logits exists at a time: `[chunk_size, V]`
    instead of `[B * T, V]`.

    Args:
        hidden_states (`torch.Tensor`): What the language model's head gets, `[B, T, d]`.
        logits_of (callable): From hidden states `[N, d]` to logits `[N, V]`, scale and soft-cap included.
        shift_labels (`torch.Tensor`): For every position the token that follows, `[B, T]`, int64.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Divides the sum of losses; by default the mean
            over labels other than `ignore_index` is taken. As Transformers' own loss does.
        ignore_index (`int`): Label of positions that do not count.
        chunk_size (`int`): Tokens whose logits are in memory at once.

    Returns:
        `torch.Tensor`: the loss, float32, a scalar.
    """
    labels = shift_labels.to(hidden_states.device).reshape(-1)
    counted = labels != ignore_index
    # Positions that do not count need no logits. One at least is kept, so that every parameter gets a gradient.
    counted[0] |= not bool(counted.any())
    hidden, labels = hidden_states.reshape(-1, hidden_states.shape[-1])[counted], labels[counted]

    def chunk_loss(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(part).float(), targets, ignore_index=ignore_index, reduction="sum")

    parts = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    if torch.is_grad_enabled():
        losses = [checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts]
    else:
        losses = [chunk_loss(*part) for part in parts]
    total = torch.stack(losses).sum()
    if num_items_in_batch is None:
        return total / (labels != ignore_index).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
