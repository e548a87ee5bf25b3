"""Looking at how a decoder's attention turns queries and keys, by running it on a few vectors.

Which dimensions form a pair, and whether a layer turns anything at all, stands in modelling code, differently in every
family. Two runs, one with every token at position 0 and one with tokens at other positions, show it; and they show
that every layer's attention goes through the interface and gets what the hook hands over. In both, attention returns
zeros, so that every layer sees the same in both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from rope_scaling.attention.rotary import RotaryLayout, Rotation
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.attention import CALL, NAME, NOTED, Noted, UnheardError


_POSITIONS = (1, 5, 11)


class _Probe:
    """Stands in for a call: attention hands it what it gets, and goes on with zeros."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        layer = len(self.seen) if layer is None else layer  # attention of encoders may not know its place
        self.seen[layer] = query.detach().double().cpu(), key.detach().double().cpu()
        return query.new_zeros(*query.shape[:3], value.shape[-1])


@dataclass(frozen=True)
class Look:
    """What a decoder was seen to do."""

    layouts: list[tuple[int, RotaryLayout] | None]
    """For every layer, which of the frequencies it is turned with and which dimensions form pairs; `None` if it does
    not turn."""
    heard: set[int]
    """Layers whose attention was called."""
    noted: Noted


def look_at(decoder: Any, inv_freqs: list[torch.Tensor], windows: set[int], silent: Collection[int] = ()) -> Look:
    """Runs a decoder on a few vectors, with attention that returns zeros.

    Args:
        decoder (`nn.Module`): The module that holds the rotary module and the layers.
        inv_freqs (list of `torch.Tensor`): Frequencies that its rotary modules hold, `[R / 2]` each.
        windows (set of `int`): Windows and chunks that its config states.
        silent (collection of `int`): Layers that may have no attention, such as recurrent ones.

    Raises:
        RopeScalingError: attention does not go through Transformers' interface, or turns in a way not known here.
    """
    first = next(decoder.parameters(), None)
    count = decoder.config.num_hidden_layers
    if first is None or first.is_meta:
        # A skeleton cannot run; it is only described.
        return Look(
            [(0, RotaryLayout(2 * len(inv_freqs[0])))] * count, set(range(count)) - set(silent), Noted(windows)
        )
    before = decoder.config._attn_implementation
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    noted = Noted()
    noting = NOTED.set(noted)
    try:
        decoder.set_attn_implementation(NAME)
        still, moved = (_run(decoder, positions, first) for positions in ((0,) * len(_POSITIONS), _POSITIONS))
    finally:
        NOTED.reset(noting)
        decoder.set_attn_implementation(before)
        for module in training:
            module.training = True
    if missing := [index for index in range(count) if index not in still and index not in silent]:
        raise RopeScalingError(
            f"The attention of {len(missing)} of the {count} layers of {type(decoder).__name__} (the first: layer "
            f"{missing[0]}) does not go through Transformers' attention interface, so spans cannot reach it."
        )
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-2}.get(first.dtype, 5e-2)
    layouts = [
        _layout(index, still[index], moved[index], inv_freqs, tolerance)
        if index in still and index not in silent
        else None
        for index in range(count)
    ]
    return Look(layouts, set(still), noted)


@torch.no_grad()
def _run(decoder: Any, positions: tuple[int, ...], like: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    probe = _Probe()

    def pass_on(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, CALL: probe}

    width, vocabulary = decoder.config.hidden_size, getattr(decoder.config, "vocab_size", 0)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, len(positions), width, generator=generator).to(like.device, like.dtype)
    tokens = torch.randint(max(vocabulary, 1), (1, len(positions)), generator=generator).to(like.device)
    reasons = []
    handle = decoder.register_forward_pre_hook(pass_on, with_kwargs=True)
    try:
        # Some models look tokens up more than once and take no vectors.
        for inputs in ({"inputs_embeds": vectors}, {"input_ids": tokens}):
            try:
                decoder(
                    **inputs,
                    position_ids=torch.tensor([positions], device=like.device),
                    attention_mask=torch.ones(1, len(positions), dtype=torch.long, device=like.device),
                    use_cache=False,
                )
                return probe.seen
            except UnheardError as error:
                raise RopeScalingError(
                    f"{type(decoder).__name__} does not hand its keyword arguments on to its attention, so spans "
                    "cannot reach it. Frequency methods work on it."
                ) from error
            except RopeScalingError:
                raise
            except Exception as error:
                reasons.append(error)
    finally:
        handle.remove()
    raise RopeScalingError(
        f"{type(decoder).__name__} could not be run on a few vectors to see how it turns them: {reasons[0]}"
    ) from reasons[0]


def _layout(
    layer: int,
    still: tuple[torch.Tensor, torch.Tensor],
    moved: tuple[torch.Tensor, torch.Tensor],
    inv_freqs: list[torch.Tensor],
    tolerance: float,
) -> tuple[int, RotaryLayout] | None:
    def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-12))

    if all(agree(one, other) for one, other in zip(moved, still, strict=True)):
        return None
    width = still[0].shape[-1]
    for index, inv_freq in enumerate(inv_freqs):
        rotary_dim = 2 * len(inv_freq)
        rotation = Rotation.by(torch.tensor(_POSITIONS).double()[:, None] * inv_freq.double().cpu())
        for backward, interleaved in product((False, True), repeat=2):
            for start in sorted({0, width - rotary_dim}):
                layout = RotaryLayout(rotary_dim, interleaved, start, backward)
                if rotary_dim <= width and rotation is not None:
                    wanted = (rotation.apply(vectors, layout) for vectors in still)
                    if all(agree(found, want) for found, want in zip(moved, wanted, strict=True)):
                        return index, layout
    raise RopeScalingError(
        f"Layer {layer} turns queries and keys in a way that this library does not know: neither halves nor "
        f"neighbours of {', '.join(str(2 * len(inv_freq)) for inv_freq in inv_freqs)} dimensions."
    )
