"""Rotating heads and merging partial results on a GPU, each in one pass over memory (Triton), and without Triton.

Plain PyTorch goes over memory several times for either, once for each operation and in float32.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from rope_scaling.attention.rotation import RotaryLayout, Rotation


try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of PyTorch, or a platform without Triton
    triton = None

_BLOCK = 32
"""Tokens of one program."""


def rotate(
    x: torch.Tensor, rotation: Rotation | None, layout: RotaryLayout, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """Heads rotated into a new tensor; themselves where there is nothing to do.

    Args:
        x (`torch.Tensor`): `[B, H, T, d]`.
        rotation (`Rotation`, *optional*): Of the `T` positions.
        layout (`RotaryLayout`): Which dimensions are rotated.
        gain (`torch.Tensor`, *optional*): What every token is multiplied with, `[T]`, float32.
    """
    if rotation is None and gain is None:
        return x
    if _use_triton(x):
        return _launch_rotate(_empty_by_token(x), x, rotation, layout, gain)
    if gain is not None:
        x = (x * gain[:, None]).to(x.dtype)
    return x if rotation is None else rotation.apply(x, layout)


def add_rotated_(
    total: torch.Tensor,
    x: torch.Tensor,
    rotation: Rotation | None,
    layout: RotaryLayout,
    gain: torch.Tensor | None = None,
    *,
    step: int = 0,
    is_reversed: bool = False,
) -> None:
    """Adds rotated heads to a total, in place.

    Args:
        total (`torch.Tensor`): `[N, H, T, d]`.
        x (`torch.Tensor`): `[N, H, T, d]`.
        rotation (`Rotation`, *optional*): From the first token of the first of the `N` blocks on.
        layout (`RotaryLayout`): Which dimensions are rotated.
        gain (`torch.Tensor`, *optional*): What every token is multiplied with, from the same on, float32.
        step (`int`): Tokens from the first of a block to the first of the next.
        is_reversed (`bool`): Whether `x` has its tokens in reverse.
    """
    if _use_triton(x):
        _launch_rotate(total, x, rotation, layout, gain, step=step, is_reversed=is_reversed, adds=True)
        return
    x = x.flip(2) if is_reversed else x
    for index, (into, block) in enumerate(zip(total, x, strict=True)):
        part = slice(index * step, index * step + x.shape[2])
        rotation_part = None if rotation is None else rotation.part(part.start, part.stop)
        into.add_(rotate(block[None].to(total.dtype), rotation_part, layout, None if gain is None else gain[part])[0])


def reverse_tokens(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` (`[N, H, T, d]`) with its tokens in reverse."""
    if not _use_triton(x):
        return x.flip(2)
    return _launch_rotate(_empty_by_token(x), x, None, RotaryLayout(0), None, is_reversed=True)


def merge_(
    out: torch.Tensor, lse: torch.Tensor, new: torch.Tensor, new_lse: torch.Tensor, *, is_reversed: bool = False
) -> None:
    """Merges another part of the softmax into output and log-sum-exp, in place.

    Args:
        out (`torch.Tensor`): Output so far, `[N, H, T, d]`.
        lse (`torch.Tensor`): Its log-sum-exp, `[N, H, T]`, float32; `-inf` where nothing was seen yet.
        new (`torch.Tensor`): Output of the part.
        new_lse (`torch.Tensor`): Its log-sum-exp.
        is_reversed (`bool`): Whether the part has its tokens in reverse.
    """
    if _use_triton(out):
        _launch_merge(out, lse, new, new_lse, is_reversed)
        return
    if is_reversed:
        new, new_lse = new.flip(2), new_lse.flip(2)
    share = torch.sigmoid(new_lse - lse)[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), new.to(share.dtype), share))
    lse.copy_(torch.logaddexp(lse, new_lse))


def _empty_by_token(x: torch.Tensor) -> torch.Tensor:
    """Like `x`, token by token in memory, as kernels read and write fastest."""
    rows, heads, length, width = x.shape
    return torch.empty(rows, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


def _use_triton(x: torch.Tensor) -> bool:
    return triton is not None and x.is_cuda and x.dtype != torch.float64 and x.stride(-1) == 1 and _works()


@cache
def _works() -> bool:
    """Whether Triton compiles here (it needs a C compiler); tried once a process."""
    out, lse = torch.ones(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 1, device="cuda")
    try:
        _launch_merge(out, lse, out.clone(), lse.clone(), False)
    except Exception as error:  # of the compiler, the driver or the launcher
        reason = str(error).splitlines()[0] if str(error) else ""
        warnings.warn(
            f"Triton does not run here ({type(error).__name__}: {reason}), so heads are rotated and partial results "
            "merged by plain PyTorch, which takes a few percent longer. Triton needs a C compiler, such as gcc.",
            stacklevel=2,
        )
        return False
    return True


def _launch_rotate(
    out: torch.Tensor,
    x: torch.Tensor,
    rotation: Rotation | None,
    layout: RotaryLayout,
    gain: torch.Tensor | None,
    *,
    step: int = 0,
    is_reversed: bool = False,
    adds: bool = False,
) -> torch.Tensor:
    rows, heads, length, width = x.shape
    cos, sin, low = (x, x, 0) if rotation is None else (rotation.cos, rotation.sin, rotation.low)
    pairs = 0 if rotation is None else cos.shape[-1]
    _rotate_kernel[triton.cdiv(length, _BLOCK), heads, rows](
        *(x, *x.stride()[:3], out, *out.stride()[:3], cos, sin, x if gain is None else gain, length, width, step),
        *(layout.start, layout.rotary_dim // 2, low, low + pairs, max(pairs, 1)),
        INTERLEAVED=layout.interleaved,
        BACKWARD=layout.backward,
        ROTATES=rotation is not None,
        GAIN=gain is not None,
        REVERSED=is_reversed,
        ADDS=adds,
        BLOCK=_BLOCK,
        WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )
    return out


def _launch_merge(
    out: torch.Tensor, lse: torch.Tensor, new: torch.Tensor, new_lse: torch.Tensor, is_reversed: bool
) -> None:
    rows, heads, length, width = out.shape
    _merge_kernel[triton.cdiv(length, _BLOCK), heads, rows](
        *(out, *out.stride()[:3], lse, *lse.stride(), new, *new.stride()[:3], new_lse, *new_lse.stride()),
        *(length, width),
        REVERSED=is_reversed,
        BLOCK=_BLOCK,
        WIDTH=triton.next_power_of_2(width),
        num_warps=4,
    )


if triton is not None:

    @triton.jit
    def _rotate_kernel(  # type: ignore[no-untyped-def]
        x, x_row, x_head, x_token, out, out_row, out_head, out_token, cos, sin, gain, length, width, step,
        start, half, low, high, pairs,
        INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, ROTATES: tl.constexpr, GAIN: tl.constexpr,
        REVERSED: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        dim = tl.arange(0, WIDTH)
        inside = token < length
        there = inside[:, None] & (dim < width)[None, :]
        read = token
        if REVERSED:
            read = length - 1 - token
        source = x + row * x_row + head * x_head + read[:, None] * x_token
        value = tl.load(source + dim[None, :], mask=there, other=0.0)
        if ROTATES or GAIN or ADDS:
            value = value.to(tl.float32)
        position = row * step + token
        if ROTATES:
            place = dim - start
            if INTERLEAVED:
                pair = place // 2
                is_second = place % 2 == 1
                partner = tl.where(is_second, dim - 1, dim + 1)
            else:
                is_second = place >= half
                pair = tl.where(is_second, place - half, place)
                partner = tl.where(is_second, dim - half, dim + half)
            moves = there & ((place >= 0) & (place < 2 * half) & (pair >= low) & (pair < high))[None, :]
            other = tl.load(source + partner[None, :], mask=moves, other=0.0).to(tl.float32)
            table = position[:, None] * pairs + (pair - low)[None, :]
            c = tl.load(cos + table, mask=moves, other=1.0)
            s = tl.load(sin + table, mask=moves, other=0.0)
            if BACKWARD:
                s = -s
            value = value * c + tl.where(is_second[None, :], other * s, -other * s)
        if GAIN:
            value = value * tl.load(gain + position, mask=inside, other=1.0).to(tl.float32)[:, None]
        target = out + row * out_row + head * out_head + token[:, None] * out_token + dim[None, :]
        if ADDS:
            value += tl.load(target, mask=there, other=0.0).to(tl.float32)
        tl.store(target, value.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _merge_kernel(  # type: ignore[no-untyped-def]
        out, out_row, out_head, out_token, lse, lse_row, lse_head, lse_token,
        new, new_row, new_head, new_token, new_lse, new_lse_row, new_lse_head, new_lse_token, length, width,
        REVERSED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        dim = tl.arange(0, WIDTH)
        inside = token < length
        there = inside[:, None] & (dim < width)[None, :]
        read = token
        if REVERSED:
            read = length - 1 - token
        at_lse = lse + row * lse_row + head * lse_head + token * lse_token
        before = tl.load(at_lse, mask=inside, other=0.0)
        at_new_lse = new_lse + row * new_lse_row + head * new_lse_head + read * new_lse_token
        added = tl.load(at_new_lse, mask=inside, other=0.0)
        largest = tl.maximum(before, added)
        old_weight, new_weight = tl.exp(before - largest), tl.exp(added - largest)
        total = old_weight + new_weight
        at_out = out + row * out_row + head * out_head + token[:, None] * out_token + dim[None, :]
        at_new = new + row * new_row + head * new_head + read[:, None] * new_token + dim[None, :]
        old = tl.load(at_out, mask=there, other=0.0).to(tl.float32)
        part = tl.load(at_new, mask=there, other=0.0).to(tl.float32)
        share = (new_weight / total)[:, None]
        tl.store(at_out, (old + (part - old) * share).to(out.dtype.element_ty), mask=there)
        tl.store(at_lse, largest + tl.log(total), mask=inside)
