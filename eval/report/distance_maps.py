"""The distance at which every query sees every key, as a picture."""

from __future__ import annotations

from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.methods import saved_method
from rope_scaling.hf.describe import read_description
from rope_scaling.methods import METHODS
from rope_scaling.notation import changed_fields
from rope_scaling.spans import SpanMethod


_TRAINED = 64
"""Trained length of maps in miniature."""


def map_figure(name: str, arguments: dict[str, Any], trained_length: int, length: int) -> Any | None:
    """A method's map at a trained length of 64 tokens, or `None` for methods that move no distances.

    Numbers of tokens among the arguments shrink with the trained length. Numbers for every pair of the model's do not
    suit a small one, so such a method has no map either.

    Args:
        name (`str`): Label of the method, as rows have it.
        arguments (`dict`): Its arguments.
        trained_length (`int`): The model's, in tokens.
        length (`int`): Tokens that were evaluated.
    """
    method = name.partition(":")[0]
    if method not in METHODS or not issubclass(METHODS[method], SpanMethod):
        return None
    if any(isinstance(value, list) for value in arguments.values()):
        return None
    shrunk = {
        key: max(value * _TRAINED // trained_length, 1)
        if type(value) is int and value >= trained_length / 16
        else value
        for key, value in arguments.items()
        if key not in ("target_length", "original_max_position_embeddings", "layer_types")
    }
    side = min(length * _TRAINED // trained_length, 8 * _TRAINED)
    return draw_map(method, shrunk, max(side, 2 * _TRAINED), _TRAINED, 0)


def saved_map(model: Any) -> tuple[str, Any]:
    """Name and map of the span method that a model was saved with, from its trained to its target length.

    Args:
        model (`nn.Module`): A model, patched or with a record of a patch in its config.

    Raises:
        RopeScalingError: it was not saved with exactly one span method, or with one that has no map in miniature.
    """
    saved = saved_method(model)
    methods = [method for method in (saved.method if saved else ()) if isinstance(method, SpanMethod)]
    if len(methods) != 1:
        carried = " with " + saved.label.removeprefix("saved ") if saved else " without a patch"
        raise RopeScalingError(f"The model was saved{carried}; a map is of one span method. Give `--method`.")
    name, slot = methods[0].name, read_description(model).slots[0]
    fields = {
        key: list(value) if isinstance(value, tuple) else value for key, value in changed_fields(methods[0]).items()
    }
    figure = map_figure(name, fields, slot.original_length, slot.target_length)
    if figure is None:
        raise RopeScalingError(f"{name!r} of this model has a value for every pair, so its map cannot be scaled down.")
    return name, figure


def draw_map(name: str, arguments: dict[str, Any], length: int, trained_length: int | None, layer: int) -> Any:
    """The figure of one method's map: relative angle over frequency, fastest and slowest pair.

    Args:
        name (`str`): A span method.
        arguments (`dict`): Its fields.
        length (`int`): Tokens.
        trained_length (`int`, *optional*): By default half of `length`.
        layer (`int`): For methods that treat layers differently.
    """
    import torch
    from matplotlib.figure import Figure

    from rope_scaling.geometry import RopeGeometry, default_inv_freq
    from rope_scaling.relative import relative_positions

    trained = trained_length or max(length // 2, 1)
    # A base at which the slowest pair makes a quarter rotation within the trained length, as in usual models.
    geometry = RopeGeometry(
        rotary_dim=32, rope_theta=max(trained * 0.6366, 2.0) ** (16 / 15), original_max_position_embeddings=trained
    )
    angles = relative_positions(name, length, geometry=geometry, layer=layer, angles=True, **arguments)
    distances = angles / default_inv_freq(geometry)  # [T, T, R / 2]
    panels = [("every pair", distances[..., 0])]
    if not torch.allclose(distances[..., 0], distances[..., -1], equal_nan=True):
        panels = [("fastest pair", distances[..., 0]), ("slowest pair", distances[..., -1])]
    figure = Figure(figsize=(5.2 * len(panels), 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=max(float(distances.nan_to_num(0).max()), trained))
        axis.axhline(trained - 0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="key position", ylabel="query position")
    figure.colorbar(image, ax=axes[0].tolist(), label="relative position, tokens", shrink=0.85)
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    figure.suptitle(f"{name}({given}), trained length {trained} (dotted)")
    return figure
