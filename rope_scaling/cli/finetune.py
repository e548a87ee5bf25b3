"""The work of `rope-scaling finetune`: from a recipe's name to a run, or to the plan of one."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from rope_scaling.errors import RopeScalingError


def show_recipes() -> None:
    """Prints the recipes that come with the package, each with what its file says first."""
    _check_installed()
    from rich.console import Console
    from rich.table import Table

    config = importlib.import_module("rope_scaling.recipes.config")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in config.recipe_names():
        about = config.recipe_about(name)
        table.add_row(name, about)
    Console().print(table)


def _check_installed() -> None:
    for package in ("pydantic", "datasets", "peft"):
        if importlib.util.find_spec(package) is None:
            raise RopeScalingError(f"Fine-tuning needs {package}: pip install 'rope-scaling[train]'.")


def run(recipe: str, overrides: list[str], output_dir: Path | None, resume: bool, dry_run: bool) -> None:
    """Runs a recipe, or shows what it would do; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    _check_installed()
    config = importlib.import_module("rope_scaling.recipes.config").read_recipe(recipe, overrides)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if dry_run:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in importlib.import_module("rope_scaling.recipes.plan").make_plan(config).items():
            table.add_row(name, value)
        console.print(table)
        return
    name = Path(recipe).stem
    folder = output_dir or Path("runs") / name
    rows = importlib.import_module("rope_scaling.recipes.train").finetune(config, name, folder, resume)
    if not rows:  # not the main process
        return
    header, *lines = importlib.import_module("rope_scaling.recipes.card").losses_table(rows)
    shown = Table(
        title="Perplexity by position; differences in nats", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for index, name_of in enumerate(header):
        shown.add_column(name_of, justify="left" if index == 0 else "right", no_wrap=index < 4)
    for cells in lines:
        shown.add_row(*cells)
    console.print(shown)
    facts = rows[0]
    console.print(f"\n{facts['trained_tokens']:,} tokens in {facts['minutes']:.1f} minutes.")
    console.print(f"Model, card, rows and checkpoints: {folder}", soft_wrap=True)
