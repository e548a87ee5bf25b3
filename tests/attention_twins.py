"""PyTorch's CUDA attention operators in plain torch: same arguments, same alignment, on any device and dtype.

The engine for GPUs runs through them in the ordinary tests. They are tested against loops here, and the real
operators against them where there is a card.
"""

import torch

from rope_scaling.attention import kernels
from rope_scaling.attention.kernels import CuDnn, Efficient, Flash, Kernels


def _attend(query, key, value, seen, scale):
    """`[N, H, T, d]`; rows that see nothing give 0 and a log-sum-exp of infinity, as FlashAttention does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    out = scores.sub(lse[..., None]).exp().nan_to_num(0) @ value
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


def _backward(grad, query, key, value, out, lse, seen, scale):
    """From output and log-sum-exp of the whole row, as fused kernels compute it."""
    groups = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    weights = scores.sub(lse[..., None]).exp()
    of_weights = grad @ v.transpose(-1, -2)
    of_scores = weights * (of_weights - (grad * out).sum(-1, keepdim=True)) * scale
    of_k, of_v = of_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
    return of_scores @ k, *(x.unflatten(1, (-1, groups)).sum(2) for x in (of_k, of_v))


def _flash_mask(queries, keys, causal, left, right, device):
    """FlashAttention aligns the last query with the last key; a window of -1 is open."""
    at = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    left, right = (-1 if side is None else side for side in (left, right))
    right = 0 if causal and right < 0 else right
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= key >= at - left
    if right >= 0:
        seen &= key <= at + right
    return seen


def flash(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    """`aten._flash_attention_forward` without cumulative lengths."""
    assert cum_q is None and cum_k is None and dropout == 0 and not debug
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    seen = _flash_mask(max_q, max_k, causal, window_size_left, window_size_right, query.device)
    out, lse = _attend(*(x.transpose(1, 2) for x in (query, key, value)), seen, scale)
    return out.transpose(1, 2).contiguous().to(query.dtype), lse, None, None, None


def flash_backward(
    grad, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    """`aten._flash_attention_backward`."""
    assert lse.is_contiguous() and lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    seen = _flash_mask(max_q, max_k, causal, window_size_left, window_size_right, query.device)
    tensors = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    return tuple(x.transpose(1, 2) for x in _backward(*tensors, lse, seen, scale))


def cudnn(query, key, value, bias, compute_lse, dropout, causal, debug, *, scale=None):
    """`aten._scaled_dot_product_cudnn_attention`: causal masks are aligned at the first key."""
    assert bias is None and compute_lse and dropout == 0 and not debug
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    out, lse = _attend(query, key, value, seen.tril() if causal else seen, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2).to(query.dtype), lse[..., None], *[None] * 7


def cudnn_backward(
    grad, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale=None
):
    """`aten._scaled_dot_product_cudnn_attention_backward`."""
    assert lse.shape == (*query.shape[:3], 1) and lse.is_contiguous()
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    seen = torch.ones(max_q, max_k, dtype=torch.bool, device=query.device)
    return _backward(grad, query, key, value, out, lse[..., 0], seen.tril() if causal else seen, scale)


def efficient(query, key, value, bias, cum_q, cum_k, max_q, max_k, dropout, mask_type, compute_lse, *, scale=None):
    """`aten._efficient_attention_forward`: no grouped queries, a log-sum-exp padded to a multiple of 32."""
    assert query.shape[2] == key.shape[2] and mask_type in (0, 1) and compute_lse
    seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    tensors = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = _attend(*tensors, seen.tril() if mask_type else seen, scale)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    return out.transpose(1, 2).contiguous(), padded, *[None] * 4


def efficient_backward(
    grad, query, key, value, bias, out, cum_q, cum_k, max_q, max_k, lse, dropout, seed, offset, mask_type,
    bias_requires_grad, *, scale=None,
):  # fmt: skip
    """`aten._efficient_attention_backward`."""
    assert lse.shape[2] % 32 == 0
    seen = torch.ones(max_q, max_k, dtype=torch.bool, device=query.device)
    tensors = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    found = _backward(*tensors, lse[..., :max_q], seen.tril() if mask_type else seen, scale)
    return *(x.transpose(1, 2) for x in found), None


FLASH = Flash(flash, flash_backward)
CUDNN = CuDnn(cudnn, cudnn_backward)
EFFICIENT = Efficient(efficient, efficient_backward)
TWINS = {
    "flash": Kernels(FLASH, FLASH),
    "cudnn": Kernels(CUDNN, FLASH),
    "efficient": Kernels(EFFICIENT, EFFICIENT),
}
"""As they are chosen on Ampere, on Hopper, and for float32."""


def use_twin(monkeypatch, name):
    """Lets patched models on a CPU run through the engine for GPUs, the large kernel in short texts too."""
    monkeypatch.setattr(kernels, "_LARGE", 48)
    monkeypatch.setattr("rope_scaling.hf.attention.choose_kernels", lambda *_: TWINS[name])
