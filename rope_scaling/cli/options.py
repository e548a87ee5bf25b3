"""Options that several commands share, and how a model is patched by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from rope_scaling.errors import RopeScalingError
from rope_scaling.lengths import tokens, tokens_or_multiple


class Command(TyperCommand):
    """A command that names arguments which it does not know before those that are missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of Typer."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Typer exports the class of this error under no one name across versions.
            if type(error).__name__ == "MissingParameter":
                _, unknown, _ = self.make_parser(ctx).parse_args(args=given)
                if unknown:
                    ctx.fail(f"Got unexpected extra argument(s) ({' '.join(unknown)})")
            raise


def length_parser(name: str, multiples: bool = True) -> Callable[[str], int | str]:
    """What Typer reads the value of an option with: tokens (`32768`, `32k`), and lengths that a model reads (`8x`).

    Args:
        name (`str`): The argument that the option is for.
        multiples (`bool`): Whether the second form is allowed; it stays text.
    """

    def read(value: str) -> int | str:
        try:
            return tokens_or_multiple(name, value) if multiples else tokens(name, value)
        except RopeScalingError as error:
            raise typer.BadParameter(str(error)) from None

    return read


ORIGINAL = Annotated[
    Optional[int],
    typer.Option(
        "--original-max-position-embeddings",
        help="Trained length in tokens, where the config has none or a wrong one (Qwen3: 32768).",
        parser=length_parser("original_max_position_embeddings", multiples=False),
        metavar="<length>",
    ),
]
TARGET_LENGTH = Annotated[
    Optional[str],
    typer.Option(
        help="The same as a length: 32768, 32k, or 8x.",
        parser=length_parser("target_length"),
        metavar="<length>",
    ),
]


def patch_by_options(
    model: Any,
    method: str | None,
    factor: float | None,
    target_length: int | str | None,
    original_length: int | None,
) -> None:
    """Patches a model in place by what is given on the command line; without a method it stays as it is.

    Args:
        model (`nn.Module`): A loaded Transformers model.
        method (`str`, *optional*): Methods as `rope_scaling.methods.parse` reads them.
        factor (`float`, *optional*): As `patch` takes it.
        target_length (`int` or `str`, *optional*): In tokens, or `8x` of what the model reads as loaded.
        original_length (`int`, *optional*): Trained length in tokens.

    Raises:
        RopeScalingError: a factor or length without a method, or as `parse` and `patch`.
    """
    from rope_scaling.hf.patch import patch
    from rope_scaling.methods import parse, patch_arguments

    extent = {
        "factor": factor,
        "target_length": target_length,
        "original_max_position_embeddings": original_length,
    }
    if method is not None:
        methods, arguments = patch_arguments(parse(method), **extent)
        patch(model, *methods, **arguments)
    elif given := [f"--{name.replace('_', '-')}" for name, value in extent.items() if value is not None]:
        names = " and ".join(f"`{name}`" for name in given)
        raise RopeScalingError(f"{names} can only be given with `--method`.")
