"""`rope-scaling plot map`: what a span method does to distances, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rope_scaling.errors import RopeScalingError


app = typer.Typer(name="plot", help="Pictures of methods.", no_args_is_help=True)


@app.callback()
def plot() -> None:
    """Pictures of methods."""


@app.command("map")
def plot_map(
    method: Annotated[str, typer.Option(help="As in 'self_extend' or 'rerope:window=16'.")],
    length: Annotated[int, typer.Option(help="Tokens.", min=2, max=2048)] = 128,
    trained_length: Annotated[
        Optional[int], typer.Option(help="Trained length in tokens. [default: half of the length]")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer, for methods that treat them differently.", min=0)] = 0,
    output: Annotated[Optional[Path], typer.Option(help="Picture to write. [default: map-METHOD.png]")] = None,
) -> None:
    """Draw the distance at which every query sees every key, for the fastest and the slowest pair."""
    import importlib

    spec = importlib.import_module("rope_scaling.eval.methods").parse_method(method)
    if not isinstance(spec.method, str):
        raise RopeScalingError(f"{method!r} names several methods; a map is of one. Give one.")
    path = output or Path(f"map-{spec.method}.png")
    if not path.parent.is_dir():
        raise RopeScalingError(f"There is no folder {str(path.parent)!r} to write the picture to.")
    draw_map(spec.method, spec.arguments, length, trained_length, layer, path)
    print(path)


def draw_map(
    name: str, arguments: dict[str, Any], length: int, trained_length: int | None, layer: int, path: Path
) -> None:
    """Writes the picture of one method's map: relative angle over frequency, fastest and slowest pair."""
    import torch
    from matplotlib.figure import Figure

    from rope_scaling.geometry import RopeGeometry, default_inv_freq
    from rope_scaling.relative import relative_positions

    trained = trained_length or max(length // 2, 1)
    # A base at which the slowest pair turns a quarter within the trained length, as in usual models.
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
    figure.colorbar(image, ax=axes[0].tolist(), label="distance that the pair sees, tokens", shrink=0.85)
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    figure.suptitle(f"{name}({given}), trained length {trained} (dotted)")
    figure.savefig(path, dpi=120)
