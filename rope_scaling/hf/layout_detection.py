"""Detection of the rotary layout of a decoder's layers, by running it on a few vectors.

How RoPE is applied (which dimensions form a pair, which layers rotate at all) is defined only in each family's
modelling code. Two runs, one with every token at position 0 and one with tokens at other positions, show it; and they
show that every layer's attention goes through Transformers' interface and gets the keyword argument of the decoder
hook. In both, attention returns zeros, so that every layer gets the same input in both.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.attention import CALL, NAME, PROBE_FACTS, MissingHookError, ProbeFacts
from rope_scaling.hf.compat import attention_implementation
from rope_scaling.hf.pretrained_rope import frequencies_from_config
from rope_scaling.hf.rotary import rotary_slots


_POSITIONS = (1, 5, 11)
_Seen = tuple[torch.Tensor, torch.Tensor]


class _Probe:
    """Stub of a call: attention hands it queries and keys, and returns zeros."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}

    def attend(
        self, layer: int | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        layer = len(self.seen) if layer is None else layer  # attention of encoders may not know its place
        self.seen[layer] = query.detach().double().cpu(), key.detach().double().cpu()
        return query.new_zeros(*query.shape[:3], value.shape[-1])


@dataclass(frozen=True)
class DetectedLayouts:
    """What was detected of a decoder."""

    layouts: list[tuple[int, RotaryLayout] | None]
    """For every layer, the index of the frequencies that it rotates with and which dimensions form pairs; `None` if it
    does not rotate."""
    heard: set[int]
    """Layers whose attention was called."""
    facts: ProbeFacts


def detect_layouts(decoder: Any, inv_freqs: list[torch.Tensor], silent: Collection[int] = ()) -> DetectedLayouts:
    """Runs a decoder on a few vectors, with attention that returns zeros.

    Args:
        decoder (`nn.Module`): The module that holds the rotary module and the layers. Where weights are missing (meta
            tensors, offloaded layers), a copy with arbitrary weights runs in its place: the rotary layout depends on
            code and config alone.
        inv_freqs (list of `torch.Tensor`): Frequencies that its rotary modules hold, `[R / 2]` each.
        silent (collection of `int`): Layers that may have no attention, such as recurrent ones.

    Raises:
        RopeScalingError: attention does not go through Transformers' interface, or the rotary layout is not supported.
    """
    count = decoder.config.num_hidden_layers
    runnable = with_weights(decoder)
    still, moved, facts = _observe(runnable)
    if missing := [index for index in range(count) if index not in still and index not in silent]:
        raise RopeScalingError(
            f"The attention of {len(missing)} of the {count} layers of {type(decoder).__name__} (the first: layer "
            f"{missing[0]}) does not go through Transformers' attention interface, so spans cannot be applied to it."
        )
    dtype = next(runnable.parameters()).dtype
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-2}.get(dtype, 5e-2)
    layouts = [
        _layout(index, still[index], moved[index], inv_freqs, tolerance)
        if index in still and index not in silent
        else None
        for index in range(count)
    ]
    return DetectedLayouts(layouts, set(still), facts)


def rotating_layers(decoder: Any) -> tuple[list[bool], set[int]] | None:
    """Which layers rotate queries and keys, and the windows that the decoder asks masks for.

    Where attention does not go through Transformers' interface, all layers count as rotating if any does.

    Args:
        decoder (`nn.Module`): As for `detect_layouts`.

    Returns:
        One flag a layer and the windows in tokens; `None` if the decoder cannot be run on a few vectors.
    """
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return None
    runnable = with_weights(decoder)
    count = decoder.config.num_hidden_layers
    if hasattr(next(runnable.parameters()), "device_mesh"):  # sharded: running it takes all processes
        return None
    with suppress(RopeScalingError):
        still, moved, facts = _observe(runnable)
        if len(still) == count:
            pairs = [(moved[index], still[index]) for index in range(count)]
            return [not all(map(torch.equal, *pair)) for pair in pairs], facts.windows
    try:
        with _evaluating(runnable):
            still_out, moved_out = (_hidden(runnable, positions) for positions in ((0,) * len(_POSITIONS), _POSITIONS))
    except Exception:  # code of any family
        return None
    return [not torch.equal(still_out, moved_out)] * count, set()


def with_weights(decoder: Any) -> Any:
    """The decoder itself, or where weights are on the meta device a copy of it on the CPU with arbitrary ones."""
    if not any(parameter.is_meta for parameter in decoder.parameters()):
        return decoder
    memo: dict[int, Any] = {}
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    # Accelerate's hooks hold the offloaded weights.
    memo |= {id(hook): None for module in decoder.modules() if (hook := vars(module).get("_hf_hook")) is not None}
    copied = copy.deepcopy(decoder, memo)
    for module in copied.modules():
        vars(module).pop("_hf_hook", None)
        if "_old_forward" in vars(module):
            module.forward = vars(module).pop("_old_forward")
    copied._forward_pre_hooks.clear()
    copied._forward_hooks.clear()
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    sizes = [_strides(tensor)[1] for tensor in (*copied.parameters(), *copied.buffers())]
    noise = noise.repeat(-(-max(sizes) // len(noise)))
    for module in copied.modules():
        _fill(module, noise)
    for slot in rotary_slots(copied):
        slot.set(*frequencies_from_config(slot, slot.config), max(_POSITIONS) + 1)
    return copied


def _fill(module: nn.Module, noise: torch.Tensor) -> None:
    """Gives a module on the meta device weights that take no memory: overlapping views of the same noise."""
    held: list[dict[str, Any]] = [module._parameters, module._buffers]
    for tensors in held:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.is_floating_point():
                filled = noise.as_strided(tensor.shape, _strides(tensor)[0])
            else:
                filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
            tensors[name] = nn.Parameter(filled, requires_grad=False) if tensors is module._parameters else filled
    if isinstance(module, nn.Linear):
        module.forward = partial(_mix, noise, module.out_features)  # type: ignore[method-assign]


def _strides(tensor: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Strides at which a tensor of that shape takes little of a shared storage, and the size that it takes: large
    matrices begin each row one number later, and stacks of matrices (experts) share one."""
    shape = tuple(tensor.shape)
    if len(shape) == 2 and tensor.numel() > 1 << 24:
        return (1, 1), sum(shape)
    strides = tuple(math.prod(shape[at + 1 :]) if at >= len(shape) - 2 else 0 for at in range(len(shape)))
    return strides, math.prod(shape[-2:])


def _mix(noise: torch.Tensor, width: int, vectors: torch.Tensor) -> torch.Tensor:
    """Instead of a matrix product; costs no more than writing its result."""
    return vectors[..., torch.arange(width) % vectors.shape[-1]] * noise[torch.arange(width) % len(noise)]


@contextmanager
def _evaluating(decoder: Any) -> Iterator[None]:
    """The decoder in evaluation mode, without gradients."""
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _observe(decoder: Any) -> tuple[dict[int, _Seen], dict[int, _Seen], ProbeFacts]:
    """Queries and keys of every layer, with all tokens at position 0 and at other positions; and what was recorded."""
    before = attention_implementation(decoder.config)
    facts = ProbeFacts()
    token = PROBE_FACTS.set(facts)
    try:
        with _evaluating(decoder):
            decoder.set_attn_implementation(NAME)
            still, moved = (_run(decoder, positions) for positions in ((0,) * len(_POSITIONS), _POSITIONS))
    finally:
        PROBE_FACTS.reset(token)
        decoder.set_attn_implementation(before)
    return still, moved, facts


def _hidden(decoder: Any, positions: tuple[int, ...]) -> torch.Tensor:
    """Hidden states of the last layer under the attention that the decoder has."""
    return decoder(**_inputs(decoder, positions)[1])[0]


def _inputs(decoder: Any, positions: tuple[int, ...]) -> list[dict[str, Any]]:
    """Arguments for a call on a few vectors, and on a few tokens; some models take only one of the two."""
    like = next(decoder.parameters())
    width, vocabulary = decoder.config.hidden_size, getattr(decoder.config, "vocab_size", 0)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, len(positions), width, generator=generator).to(like.device, like.dtype)
    tokens = torch.randint(max(vocabulary, 1), (1, len(positions)), generator=generator).to(like.device)
    shared = {
        "position_ids": torch.tensor([positions], device=like.device),
        "attention_mask": torch.ones(1, len(positions), dtype=torch.long, device=like.device),
        "use_cache": False,
    }
    return [{"inputs_embeds": vectors, **shared}, {"input_ids": tokens, **shared}]


def _run(decoder: Any, positions: tuple[int, ...]) -> dict[int, _Seen]:
    probe = _Probe()

    def pass_on(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, CALL: probe}

    reasons = []
    handle = decoder.register_forward_pre_hook(pass_on, with_kwargs=True)
    try:
        for inputs in _inputs(decoder, positions):
            try:
                decoder(**inputs)
                return probe.seen
            except MissingHookError as error:
                raise RopeScalingError(
                    f"{type(decoder).__name__} does not hand its keyword arguments on to its attention, so spans "
                    "cannot be applied to it. Frequency methods work on it."
                ) from error
            except RopeScalingError:
                raise
            except Exception as error:
                reasons.append(error)
    finally:
        handle.remove()
    raise RopeScalingError(
        f"{type(decoder).__name__} could not be run on a few vectors to detect its rotary layout: {reasons[0]}"
    ) from reasons[0]


def _layout(
    layer: int,
    still: _Seen,
    moved: _Seen,
    inv_freqs: list[torch.Tensor],
    tolerance: float,
) -> tuple[int, RotaryLayout] | None:
    def agree(seen: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((seen - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-12))

    if all(map(agree, moved, still)):
        return None
    width = still[0].shape[-1]
    for index, inv_freq in enumerate(inv_freqs):
        rotary_dim = 2 * len(inv_freq)
        rotation = Rotation.by(torch.tensor(_POSITIONS).double()[:, None] * inv_freq.double().cpu())
        for backward, interleaved in product((False, True), repeat=2):
            for start in sorted({0, width - rotary_dim}):
                layout = RotaryLayout(rotary_dim, interleaved, start, backward)
                if rotary_dim <= width and rotation is not None:
                    wanted = [rotation.apply(vectors, layout) for vectors in still]
                    if all(map(agree, moved, wanted)):
                        return index, layout
    raise RopeScalingError(
        f"Layer {layer} uses an unsupported rotary layout: neither half-split nor interleaved over "
        f"{', '.join(str(2 * len(inv_freq)) for inv_freq in inv_freqs)} dimensions."
    )
