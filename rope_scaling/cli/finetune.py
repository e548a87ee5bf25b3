"""The work of `rope-scaling finetune`: from a recipe's name to a run, or to the plan of one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_scaling.errors import RopeScalingError


if TYPE_CHECKING:
    from rope_scaling.recipes.config import Recipe


def show_recipes() -> None:
    """Prints the recipes that come with the package, each with what its file says first."""
    _check_installed()
    from rich.console import Console
    from rich.table import Table

    from rope_scaling.recipes.config import recipe_about, recipe_names

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in recipe_names():
        table.add_row(name, recipe_about(name))
    Console().print(table)


def _check_installed() -> None:
    for package in ("pydantic", "datasets", "peft"):
        if find_spec(package) is None:
            raise RopeScalingError(f"Fine-tuning needs {package}: pip install 'rope-scaling[train]'.")


def run(recipe: str, overrides: list[str], output_dir: Path | None, resume: bool, dry_run: bool) -> None:
    """Runs a recipe, or shows what it would do; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can fix.
    """
    _check_installed()
    from rope_scaling.recipes.config import read_recipe

    config = read_recipe(recipe, overrides)
    if dry_run:
        _show_plan(config)
        return
    from rope_scaling.recipes.train import finetune

    name = Path(recipe).stem
    folder = output_dir or Path("runs") / name
    rows = finetune(config, name, folder, resume)
    if rows:  # the other processes have none
        _show_losses(rows, folder)


def _show_plan(config: Recipe) -> None:
    from rich.console import Console
    from rich.table import Table

    from rope_scaling.recipes.plan import make_plan

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in make_plan(config).items():
        table.add_row(name, value)
    Console().print(table)


def _show_losses(rows: list[dict[str, Any]], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from rope_scaling.recipes.card import losses_table

    header, *lines = losses_table(rows)
    table = Table(
        title="Perplexity by position; differences in nats", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for index, heading in enumerate(header):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index < 4)
    for cells in lines:
        table.add_row(*cells)
    console = Console()
    console.print(table)
    console.print(f"\n{rows[0]['trained_tokens']:,} tokens in {rows[0]['minutes']:.1f} minutes.")
    console.print(f"Model, card, rows and checkpoints: {folder}", soft_wrap=True)
