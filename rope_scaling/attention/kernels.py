"""PyTorch's own attention kernels that return a log-sum-exp, forward and backward, and which of them to use.

Whatever PyTorch would pick for plain causal attention on the tensors at hand computes the large blocks, so that a
span costs what stock attention costs. Every kernel is compared with the definition once per process, device, dtype
and head shape before it is used; one that disagrees or fails is left out with a warning.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend


aten = torch.ops.aten

_LARGE = 1024
"""Queries of a block from which on PyTorch's choice computes it; it may have to plan for every new shape, which
smaller blocks do not repay."""
_TOLERANCE = 0.03
"""Largest difference of a kernel from the definition, relative to the largest value; bfloat16 rounds by 0.004."""


class Kernel(ABC):
    """A fused attention kernel. Queries are `[N, H, T, d]`, keys and values `[N, Hk, S, d]`, `H` a multiple of `Hk`.

    Shapes of a block are those of `rope_scaling.attention.blocks.Block`.
    """

    name: ClassVar[str]
    shapes: ClassVar[frozenset[str]] = frozenset({"full", "causal"})
    """Shapes that it computes; where `reversed` is not among them, the engine reverses the tensors."""

    @abstractmethod
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: str, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, `[N, H, T, d]`, and log-sum-exp of the scores, `[N, H, T]`, float32."""

    @abstractmethod
    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        shape: str,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, given output and log-sum-exp of the whole row."""


@dataclass(frozen=True)
class Flash(Kernel):
    """FlashAttention, in the version that PyTorch has active (`torch.nn.attention.activate_flash_attention_impl`)."""

    name: ClassVar[str] = "FlashAttention"
    shapes: ClassVar[frozenset[str]] = frozenset({"full", "causal", "reversed", "band"})

    run: Callable[..., Any] = aten._flash_attention_forward
    run_backward: Callable[..., Any] = aten._flash_attention_backward

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: str, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        lengths = q.shape[1], k.shape[1]
        out, lse, *_ = self.run(
            q, k, v, None, None, *lengths, 0.0, _is_causal(shape), False, **_window(shape, *lengths), scale=scaling
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        shape: str,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tensors = [x.transpose(1, 2) for x in (grad, query, key, value, out)]
        lengths = query.shape[2], key.shape[2]
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
        gradients = self.run_backward(
            *tensors,
            lse.contiguous(),
            None,
            None,
            *lengths,
            0.0,
            _is_causal(shape),
            state,
            state,
            **_window(shape, *lengths),
            scale=scaling,
        )
        return tuple(gradient.transpose(1, 2) for gradient in gradients)  # type: ignore[return-value]


def _is_causal(shape: str) -> bool:
    return shape in ("causal", "band")


def _window(shape: str, queries: int, keys: int) -> dict[str, Any]:
    """FlashAttention aligns the last query with the last key."""
    if shape == "reversed":
        return {"window_size_left": 0, "window_size_right": -1}
    if shape == "band":
        return {"window_size_left": keys - queries, "window_size_right": 0}
    return {}


@dataclass(frozen=True)
class CuDnn(Kernel):
    """cuDNN's attention, the fastest of PyTorch's on Hopper and Blackwell."""

    name: ClassVar[str] = "cuDNN"

    run: Callable[..., Any] = aten._scaled_dot_product_cudnn_attention
    run_backward: Callable[..., Any] = aten._scaled_dot_product_cudnn_attention_backward

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: str, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self.run(query, key, value, None, True, 0.0, shape == "causal", False, scale=scaling)
        return out, lse.squeeze(-1)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        shape: str,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, which there is none of
        lengths = query.shape[2], key.shape[2]
        return self.run_backward(  # type: ignore[no-any-return]
            *(grad, query, key, value, out, lse[..., None].contiguous(), state, state, None, None, None),
            *(*lengths, 0.0, shape == "causal"),
            scale=scaling,
        )


@dataclass(frozen=True)
class Efficient(Kernel):
    """The memory-efficient kernel of xFormers, for float32. It reads a copy of the keys for every query head."""

    name: ClassVar[str] = "memory-efficient attention"

    run: Callable[..., Any] = aten._efficient_attention_forward
    run_backward: Callable[..., Any] = aten._efficient_attention_backward

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: str, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = self.run(
            q, k, v, None, None, None, None, None, 0.0, int(shape == "causal"), True, scale=scaling
        )
        return out.transpose(1, 2), lse[..., : query.shape[2]]

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        shape: str,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, query, key, value, out))
        lengths = query.shape[2], key.shape[2]
        padded = torch.nn.functional.pad(lse, (0, -lengths[0] % 32), value=torch.inf)
        state = torch.zeros((), dtype=torch.int64, device=query.device)  # of dropout, which there is none of
        of_q, of_k, of_v, _ = self.run_backward(
            *(
                grad,
                q,
                k,
                v,
                None,
                out,
                None,
                None,
                *lengths,
                padded,
                0.0,
                state,
                state,
                int(shape == "causal"),
                False,
            ),
            scale=scaling,
        )
        of_q, of_k, of_v = (gradient.transpose(1, 2) for gradient in (of_q, of_k, of_v))
        of_k, of_v = (gradient.unflatten(1, (-1, groups)).sum(2) for gradient in (of_k, of_v))
        return of_q, of_k, of_v


@dataclass(frozen=True)
class Kernels:
    """The kernels of one device, dtype and head shape."""

    large: Kernel
    """For blocks of many queries."""
    small: Kernel
    """For blocks of few, as in decoding and short documents."""
    reason: str = ""
    """Why these, for `describe` and the log."""

    def of(self, shape: str, queries: int) -> Kernel:
        """The kernel for a block of a shape with a number of queries."""
        return self.large if queries >= _LARGE and shape != "band" else self.small

    def native_band(self, width: int, queries: int) -> bool:
        """Whether a band goes through one call; on the faster kernel two triangles of a wide one are faster."""
        return "band" in self.small.shapes and (self.large is self.small or min(width, queries) < _LARGE)

    def __str__(self) -> str:
        names = dict.fromkeys((self.large.name, self.small.name))
        return " and ".join(names) + (f" ({self.reason})" if self.reason else "")


def choose_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradients: bool) -> Kernels | None:
    """The kernels for tensors like these, or `None` where none serves (also on a CPU, which has its own engine).

    Args:
        query (`torch.Tensor`): `[B, H, T, d]`.
        key (`torch.Tensor`): `[B, Hk, S, d]`.
        value (`torch.Tensor`): `[B, Hk, S, dv]`.
        gradients (`bool`): Whether a backward pass will follow.
    """
    if query.device.type != "cuda" or value.shape[-1] != query.shape[-1]:
        return None
    return _chosen(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], gradients)


@cache
def _chosen(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, width: int, gradients: bool
) -> Kernels | None:
    query, key = (torch.empty(1, count, 1, width, device=device, dtype=dtype) for count in (heads, key_heads))
    candidates = _candidates(query, key)
    works = [kernel for kernel in candidates if _agrees(kernel, query, key, gradients)]
    if not works:
        return None
    reason = "PyTorch's choice for causal attention here" if works[0] is candidates[0] else "the one that works here"
    return Kernels(works[0], works[-1], reason)


def _candidates(query: torch.Tensor, key: torch.Tensor) -> list[Kernel]:
    """Kernels that take such heads: PyTorch's choice for a long causal sequence first, the most flexible last."""
    width = query.shape[3]
    if query.dtype == torch.float32:
        return [Efficient()] if width % 4 == 0 else []
    if query.dtype not in (torch.float16, torch.bfloat16) or width % 8 or width > 256:
        return []
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return [Efficient()]  # FlashAttention needs Ampere
    long = query.expand(-1, -1, 8192, -1), key.expand(-1, -1, 8192, -1)
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(*long, long[1], None, 0.0, True, enable_gqa=grouped)
    return [CuDnn(), Flash()] if SDPBackend(choice) == SDPBackend.CUDNN_ATTENTION else [Flash()]


def _agrees(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, gradients: bool) -> bool:
    """Runs a kernel on random tokens and compares with the definition; warns where it fails or differs."""
    try:
        differences = [_difference(kernel, query, key, shape, gradients) for shape in sorted(kernel.shapes)]
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except (RuntimeError, NotImplementedError, TypeError) as error:
        problem = f"it failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    else:
        if all(difference < _TOLERANCE for difference in differences):
            return True
        shown = ", ".join(f"{difference:.2g}" for difference in differences)
        problem = f"its results differ from attention's definition ({shown} of the largest value)"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {_device_name(query.device)}"
    warnings.warn(
        f"{kernel.name} is not used for heads of width {query.shape[3]} in {query.dtype} ({versions}): {problem}. "
        "Attention of patched models takes another kernel, or is computed in blocks, which is slower.",
        stacklevel=2,
    )
    return False


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@torch.enable_grad()
def _difference(kernel: Kernel, query: torch.Tensor, key: torch.Tensor, shape: str, gradients: bool) -> float:
    """The largest difference of a kernel's results from the definition, relative to the largest value; may be NaN."""
    queries, keys = 192, {"full": 160, "band": 320}.get(shape, 192)
    generator = torch.Generator(query.device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, length, x.shape[1], x.shape[3], generator=generator, device=x.device)
        .to(x.dtype)
        .transpose(1, 2)
        for x, length in ((query, queries), (key, keys), (key, keys), (query, queries))
    )
    exact = tuple(x.float().requires_grad_() for x in (q, k, v))
    wanted_out, wanted_lse = dense(exact[0], exact[1], exact[2], shape, 0.1)
    wanted = [wanted_out, wanted_lse]
    with torch.no_grad():
        found = list(kernel.forward(q, k, v, shape, 0.1))
        if gradients:
            wanted += torch.autograd.grad(wanted_out, exact, grad.float())
            found += kernel.backward(grad, q, k, v, found[0], found[1], shape, 0.1)
        differences = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
        return float(torch.stack(differences).max())


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: str, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a block by the definition, from a matrix of all scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    ahead = torch.arange(key.shape[2], device=key.device) - torch.arange(query.shape[2], device=key.device)[:, None]
    seen = {
        "full": ahead == ahead,
        "causal": ahead <= 0,
        "reversed": ahead >= 0,
        "band": (ahead >= 0) & (ahead <= key.shape[2] - query.shape[2]),
    }[shape]
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)
