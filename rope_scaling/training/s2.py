"""Shifted sparse attention, for training only.

Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
https://huggingface.co/papers/2309.12307. Tokens attend within groups of consecutive ones; for half of the heads the
groups lie half a group later, so that neighbours are connected. The paper's released eager code rolls the
sequence, by which the first tokens see the last ones; here the ends of the shifted half are two shorter groups.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from rope_scaling.errors import RopeScalingError, check_length


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention within groups, shifted by half a group for the second half of the heads.

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, T, d]`, `Hk` a divisor of `H`.
        value (`torch.Tensor`): `[B, Hk, T, d]`.
        group_size (`int`): Tokens of a group, even; a quarter of the training length in the paper.
        scaling (`float`, *optional*): Of scores; `d ** -0.5` by default.
        attention_mask (`torch.Tensor`, *optional*): `[B or 1, 1 or H, T, T]`, bool (true: seen) or added to scores,
            for padding, packed documents and windows; causal on its own. `None` for causal attention alone.
        dropout (`float`): Of attention weights.

    Returns:
        `torch.Tensor`: `[B, H, T, d]`.

    Raises:
        RopeScalingError: `group_size` is odd, there is a single head, or query and key lengths differ (a cache).
    """
    if check_length("group_size", group_size) % 2:
        raise RopeScalingError(
            f"`group_size` must be even, since half of the heads are shifted by half of it; got {group_size}."
        )
    heads, length = query.shape[1], query.shape[2]
    if heads < 2:
        raise RopeScalingError("S2 attention shifts half of the heads; this model has a single one.")
    if key.shape[2] != length:
        raise RopeScalingError(
            f"S2 attention is for training without a cache; got {length} queries and {key.shape[2]} keys. Call "
            "`model.eval()` to run the model with full attention."
        )
    if heads != key.shape[1]:
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    halves = []
    for chosen, shift in ((slice(0, heads // 2), 0), (slice(heads // 2, None), group_size // 2)):
        own = attention_mask
        if own is not None and own.shape[1] == heads:
            own = own[:, chosen]
        q, k, v = (x[:, chosen] for x in (query, key, value))
        halves.append(_grouped(q, k, v, group_size, shift, scaling, own, dropout))
    return torch.cat(halves, dim=1)


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    size: int,
    first: int,
    scaling: float | None,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention within groups of `size`, the first of which has `first` tokens (0 for a whole one)."""
    length = query.shape[2]
    first = min(first, length)
    whole = (length - first) // size
    last = first + whole * size
    outs = []
    for begin, end, count in ((0, first, 1), (first, last, whole), (last, length, 1)):
        if begin == end:
            continue
        # Groups go into the batch, so that one kernel call does all of them.
        q, k, v = (
            x[:, :, begin:end].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
        )
        own = None if mask is None else _diagonal_blocks(mask[:, :, begin:end, begin:end], count, len(query))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=own, dropout_p=dropout, is_causal=own is None, scale=scaling
        )
        outs.append(out.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3))
    return torch.cat(outs, dim=2)


def _diagonal_blocks(mask: torch.Tensor, count: int, rows: int) -> torch.Tensor:
    """A mask's blocks of queries and keys of the same group, `[B * count, 1 or H, size, size]`."""
    blocks = mask.unflatten(3, (count, -1)).unflatten(2, (count, -1))  # [b, h, count, size, count, size]
    blocks = blocks.diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3)  # [b, count, h, size, size]
    blocks = blocks.expand(rows, -1, -1, -1, -1).flatten(0, 1)
    if blocks.dtype == torch.bool:
        # A query whose keys all lie in another group (left padding) sees itself, or softmax would have nothing.
        blocks = blocks | torch.eye(blocks.shape[-1], dtype=torch.bool, device=blocks.device)
    return blocks
