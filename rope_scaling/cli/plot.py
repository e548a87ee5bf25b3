"""`rope-scaling plot map`: what a span method does to distances, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

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
    maps = importlib.import_module("rope_scaling.eval.maps")
    maps.draw_map(spec.method, spec.arguments, length, trained_length, layer).savefig(path, dpi=120)
    print(path)
