"""What a span method does, as numbers: the distance, or the angles, at which every query meets every key."""

from __future__ import annotations

from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, check_length
from rope_scaling.geometry import RopeGeometry, default_inv_freq
from rope_scaling.methods import make_method
from rope_scaling.spans import Rope, SpanMethod, compose, plain


def relative_positions(
    method: str | SpanMethod,
    length: int,
    *,
    trained_length: int | None = None,
    geometry: RopeGeometry | None = None,
    layer: int = 0,
    angles: bool = False,
    **arguments: Any,
) -> torch.Tensor:
    """The distance at which every query sees every key, under a span method.

    ```python
    rope_scaling.relative_positions("self_extend", 16, window=4, group_size=2, trained_length=8)
    ```

    Args:
        method (`str` or `SpanMethod`): A name with its fields as further arguments, or a method object.
        length (`int`): Tokens `T`.
        trained_length (`int`, *optional*): Trained length of the model; by default that of `geometry`, or half of
            `length`.
        geometry (`RopeGeometry`, *optional*): The model's rotary part; by default width 64, base 10,000.
        layer (`int`, *optional*, defaults to 0): Layer, for methods that treat them differently.
        angles (`bool`, *optional*, defaults to `False`): Return every pair's relative angle in radians.

    Returns:
        `torch.Tensor`: float64, NaN where the query does not see the key. `[T, T]`, query first: the relative angle
        of the fastest pair over its frequency, which is the distance wherever a method moves all pairs alike. With
        `angles`, `[T, T, R / 2]`.

    Raises:
        RopeScalingError: a method that is not one of spans, or values that are not allowed.
    """
    length = check_length("length", length)
    if arguments and not isinstance(method, str):
        raise RopeScalingError(
            f"{', '.join(f'`{name}`' for name in arguments)}: a method object carries its own fields; set them "
            "there, as "
            f"in `{type(method).__name__}(...)`."
        )
    if geometry is not None and trained_length is not None:
        raise RopeScalingError(
            f"`trained_length` is {trained_length} and the geometry has {geometry.original_max_position_embeddings}. "
            "Give one of the two."
        )
    made = make_method(method, **arguments) if isinstance(method, str) else method
    if not isinstance(made, SpanMethod):
        raise RopeScalingError(
            f"{getattr(made, 'name', made)!r} is not a span method; it does not change relative positions."
        )
    if geometry is None:
        trained = check_length("trained_length", trained_length or max(length // 2, 1))
        geometry = RopeGeometry(rotary_dim=64, rope_theta=1e4, original_max_position_embeddings=trained)
    inv_freq = default_inv_freq(geometry)
    rope = Rope(geometry, inv_freq, geometry.original_max_position_embeddings, length)
    positions = torch.arange(length)
    host = positions.double()[:, None] * inv_freq  # [T, R / 2]
    found = torch.full((length, length, geometry.num_pairs), torch.nan, dtype=torch.float64)
    for span in compose(made.layer_spans(rope, layer), plain()):
        first, last = span.first(positions), span.last(positions)
        seen = (positions >= first[:, None]) & (positions <= last[:, None])  # [T, T]
        query = host if span.query is None else span.query(positions)
        key = host if span.key is None else span.key(positions)
        relative = query[:, None] - key[None]
        if span.amplitude is not None:
            relative = torch.where(span.amplitude == 0, torch.nan, relative)
        found = torch.where(seen[..., None], relative, found)
    return found if angles else found[..., 0] / inv_freq[0]
