"""The command `rope-scaling`. What is heavy loads when a command runs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rope_scaling.cli import plot
from rope_scaling.cli.options import ORIGINAL, TARGET_LENGTH, Command, length_parser, patch_by_options
from rope_scaling.errors import RopeScalingError
from rope_scaling.version import __version__


app = typer.Typer(
    name="rope-scaling",
    help="Patch RoPE language models to read beyond their trained length, and measure how far they do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


DTYPE_HELP = "auto (the checkpoint's, or float32 on a processor that is slow in it), float32, bfloat16 or float16."
app.add_typer(plot.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"rope-scaling {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Option(help="'demo' (the embedded model), a folder (an adapter's too), or a hub id.")
    ] = "demo",
    method: Annotated[
        Optional[list[str]],
        typer.Option(
            help=(
                "Repeat for several; fields as in 'yarn:beta_fast=16'. [default: every method that needs only "
                "a factor]"
            )
        ),
    ] = None,
    factor: Annotated[
        Optional[float], typer.Option(help="Factor to patch with. [default: longest length over trained length]")
    ] = None,
    target_length: TARGET_LENGTH = None,
    original_length: ORIGINAL = None,
    lengths: Annotated[
        str, typer.Option(help="Ascending, in tokens ('8192,16384') or trained lengths ('1x,2x').")
    ] = "1x,2x,4x,8x",
    data: Annotated[
        str,
        typer.Option(
            help=(
                "'stdlib', 'python-reference', a text file, a folder, a JSON-lines/CSV/Parquet file, or a hub dataset."
            )
        ),
    ] = "stdlib",
    column: Annotated[str, typer.Option(help="Column of the text, in a table or dataset.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "test",
    subset: Annotated[Optional[str], typer.Option(help="Configuration of a hub dataset.")] = None,
    suite: Annotated[
        Optional[str], typer.Option(help="quick, full, paper, or a YAML file of tasks and their settings.")
    ] = None,
    task: Annotated[
        Optional[list[str]],
        typer.Option(help="A task, as in niah_multikey:trials=2; repeatable. [default: perplexity]"),
    ] = None,
    pieces: Annotated[
        bool, typer.Option(help="Cut each text into documents of the longest length, in place of its start only.")
    ] = False,
    max_documents: Annotated[Optional[int], typer.Option(help="Stop after that many documents.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    chunk_size: Annotated[int, typer.Option(help="Tokens of a forward call.", min=1)] = 2048,
    model_name: Annotated[Optional[str], typer.Option(help="What rows call the model. [default: --model]")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    output: Annotated[
        Optional[Path],
        typer.Option(help="Folder for rows, scores, table and plot. [default: runs/evaluate-MODEL-SETTINGS]"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the folder's scores; measure again.")] = False,
) -> None:
    """Measure how far a model reads: unpatched, cropped, and under each method.

    A model that was saved patched is measured under its patch, against the same weights without it; an adapter is
    merged into its base model first.
    """
    from rope_scaling.cli.evaluate import RunOptions, TextOptions, run

    options = RunOptions(
        model=model,
        methods=method or [],
        lengths=lengths,
        factor=factor,
        target_length=target_length,
        original_length=original_length,
        dtype=dtype,
        device=device,
        chunk_size=chunk_size,
        model_name=model_name,
        seed=seed,
        output=output,
        fresh=fresh,
    )
    texts = TextOptions(
        data=data, column=column, split=split, subset=subset, pieces=pieces, max_documents=max_documents
    )
    run(options, texts, suite, task or [])


@app.command()
def harness(
    tasks: Annotated[str, typer.Option(help="lm-eval's names, as in 'ruler' or 'niah_single_1,ruler_vt'.")],
    model: Annotated[
        str, typer.Option(help="'demo' (the embedded model), a folder (an adapter's too), or a hub id.")
    ] = "demo",
    method: Annotated[Optional[list[str]], typer.Option(help="Repeat for several, as for `evaluate`.")] = None,
    samples: Annotated[int, typer.Option(help="Documents of each task and length.", min=1)] = 50,
    lengths: Annotated[
        str, typer.Option(help="As for `evaluate`; each document at the shortest that holds it.")
    ] = "1x,2x,4x",
    factor: Annotated[Optional[float], typer.Option(help="Factor to patch with.")] = None,
    target_length: TARGET_LENGTH = None,
    original_length: ORIGINAL = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    timeout: Annotated[int, typer.Option(help="Seconds that making a task's documents may take.", min=1)] = 3600,
    model_name: Annotated[Optional[str], typer.Option(help="What rows call the model. [default: --model]")] = None,
    seed: Annotated[int, typer.Option(help="Of documents and bootstrap.")] = 0,
    output: Annotated[Optional[Path], typer.Option(help="Folder for rows and tables.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the folder's scores; measure again.")] = False,
) -> None:
    """Run RULER, LongBench, BABILong or any other task of lm-eval under each method."""
    from rope_scaling.cli.evaluate import RunOptions
    from rope_scaling.cli.harness import run

    options = RunOptions(
        model=model,
        methods=method or [],
        lengths=lengths,
        factor=factor,
        target_length=target_length,
        original_length=original_length,
        dtype=dtype,
        device=device,
        model_name=model_name,
        seed=seed,
        output=output,
        fresh=fresh,
    )
    run(options, tasks, samples, timeout)


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Folders that `evaluate` wrote; several are compared.")],
    output: Annotated[
        Optional[Path], typer.Option(help="Folder for page, tables and pictures. [default: the run's, or runs/report]")
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Allow several models or texts; each gets a section of its own.")
    ] = False,
    fail_if: Annotated[
        Optional[list[str]],
        typer.Option(help="Exit with 1 if a method meets this: 'usable_length < 4x', 'yarn: tax > 0.02'; repeatable."),
    ] = None,
) -> None:
    """Write the rows of runs as one page, Markdown, CSV and figures."""
    from rope_scaling.cli import report as command

    raise typer.Exit(command.run(run, output, mixed, fail_if or []))


@app.command(cls=Command)
def methods() -> None:
    """List the methods there are, in one screen."""
    from rich.console import Console
    from rich.table import Table

    from rope_scaling.methods import METHODS

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("name", "what it changes", "training", "paper"):
        table.add_column(heading, no_wrap=True)
    for name, cls in METHODS.items():
        paper = cls.paper.removeprefix("https://huggingface.co/")
        paper = paper.removeprefix("papers/").replace("https://kexue.fm/archives/", "kexue ")
        table.add_row(name, cls.changes, cls.needs_training, paper)
    Console().print(table)
    print("\nPapers: huggingface.co/papers/NUMBER. Training: no (not needed), helps, yes (needed).")
    print("Try one: rope-scaling describe demo --method yarn --factor 8 --pairs")


@app.command(cls=Command)
def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file. Without it, a list of them.")] = "",
    overrides: Annotated[
        Optional[list[str]], typer.Argument(help="Single fields, as in training.max_steps=100 patch.factor=8.")
    ] = None,
    output_dir: Annotated[
        Optional[Path], typer.Option(help="New folder for the model; runs/RECIPE by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and check it.")] = False,
) -> None:
    """Train a patched model on longer texts by a recipe."""
    from rope_scaling.cli.finetune import run, show_recipes

    if recipe:
        run(recipe, overrides or [], output_dir, resume, dry_run)
    else:
        show_recipes()


@app.command(cls=Command)
def describe(
    model: Annotated[
        str, typer.Argument(help="'demo', a folder (an adapter's too), or a hub id; its weights are not loaded.")
    ],
    pairs: Annotated[bool, typer.Option(help="Also print the table of every rotated pair.")] = False,
    method: Annotated[Optional[str], typer.Option(help="Show what this method would do.")] = None,
    factor: Annotated[Optional[float], typer.Option(help="Factor for the method.")] = None,
    target_length: TARGET_LENGTH = None,
    original_length: ORIGINAL = None,
) -> None:
    """Say which scaling a model has, with the patch that it was saved with, or would have under a method."""
    from rope_scaling.hf.describe import describe as describe_model
    from rope_scaling.hf.loading import load_skeleton

    skeleton = load_skeleton(model)
    patch_by_options(skeleton, method, factor, target_length, original_length)
    describe_model(skeleton, pairs=pairs)


@app.command(cls=Command)
def export(
    model: Annotated[str, typer.Argument(help="'demo', a folder (an adapter's too), or a hub id.")],
    target: Annotated[str, typer.Option(help="transformers, transformers-v4, vllm, sglang or llama.cpp.")],
    out: Annotated[
        Optional[Path], typer.Option(help="New folder. Without one, the keys to override are printed as JSON.")
    ] = None,
    method: Annotated[
        Optional[str], typer.Option(help="Patch with this first. [default: as the model was saved]")
    ] = None,
    factor: Annotated[Optional[float], typer.Option(help="Factor for the method.")] = None,
    target_length: TARGET_LENGTH = None,
    original_length: ORIGINAL = None,
    gguf: Annotated[
        Optional[Path], typer.Option(help="A GGUF file of the model: `--out` is a copy of it with the scaling inside.")
    ] = None,
    adapter: Annotated[Optional[str], typer.Option(help="A PEFT adapter, merged under the patch it records.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write a patched model for a server that does not know this library."""
    from rope_scaling.cli.export import run

    run(
        model,
        target,
        out=out,
        method=method,
        factor=factor,
        target_length=target_length,
        original_length=original_length,
        adapter=adapter,
        dtype=dtype,
        gguf=gguf,
    )


@app.command(cls=Command)
def doctor(
    model: Annotated[str, typer.Argument(help="'demo', a folder (an adapter's too), or a hub id; no weights needed.")],
    target_length: Annotated[
        Optional[str],
        typer.Option(
            help="Length that it is to read. [default: what its config states]",
            parser=length_parser("target_length"),
            metavar="<length>",
        ),
    ] = None,
    original_length: ORIGINAL = None,
    target: Annotated[
        Optional[list[str]], typer.Option(help="What will serve it, as in `export`; repeat for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is wrong with the scaling of a checkpoint; exit with status 1 if anything is."""
    from rope_scaling.cli.doctor import run

    run(model, target_length, original_length, target or [], as_json)


def main(arguments: list[str] | None = None) -> Any:
    """Runs the command line; anything the user can fix ends in one line on standard error and exit status 2."""
    command = typer.main.get_command(app)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            sys.exit(command.main(arguments, prog_name="rope-scaling", standalone_mode=False) or 0)
    except RopeScalingError as error:
        fail(str(error))
    except Exception as error:
        # Typer's own usage errors, whose classes it does not export under one name across versions.
        if hasattr(error, "format_message") and getattr(error, "exit_code", None) is not None:
            fail(error.format_message())
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning for users in one line; they have written none of the lines that Python would name."""
    if category is UserWarning:
        print(f"rope-scaling: warning: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def fail(message: str) -> None:
    """Says what was wrong on one line and exits with status 2."""
    print(f"rope-scaling: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
