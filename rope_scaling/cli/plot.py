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
    method: Annotated[Optional[str], typer.Option(help="As in 'self_extend' or 'rerope:window=16'.")] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            help=(
                "A patched model or adapter, in place of a method: its own method, from its trained to its target "
                "length, scaled down."
            )
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens.", min=2, max=2048)] = 128,
    trained_length: Annotated[
        Optional[int], typer.Option(help="Trained length in tokens. [default: half of the length]")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer, for methods that treat them differently.", min=0)] = 0,
    output: Annotated[Optional[Path], typer.Option(help="Picture to write. [default: map-METHOD.png]")] = None,
) -> None:
    """Draw the distance at which every query sees every key, for the fastest and the slowest pair."""
    if (method is None) == (model is None):
        raise RopeScalingError("Give `--method` or `--model`, one of the two.")
    from rope_scaling.eval.report.distance_maps import draw_map, saved_map

    if model is not None:
        from rope_scaling.hf.loading import load_skeleton

        name, figure = saved_map(load_skeleton(model))
        path = _path(output, name)
    else:
        from rope_scaling.eval.methods import parse_method

        spec = parse_method(method)
        if not isinstance(spec.method, str):
            raise RopeScalingError(f"{method!r} names several methods; a map is of one. Give one.")
        path = _path(output, spec.method)
        figure = draw_map(spec.method, spec.arguments, length, trained_length, layer)
    figure.savefig(path, dpi=120)
    print(path)


def _path(output: Path | None, name: str) -> Path:
    path = output or Path(f"map-{name}.png")
    if not path.parent.is_dir():
        raise RopeScalingError(f"There is no folder {str(path.parent)!r} to write the picture to.")
    return path
