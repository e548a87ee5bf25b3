"""The work of `rope-scaling evaluate`: from options to a table, a plot and rows."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError, check_number


def run(
    *,
    model: str,
    methods: list[str] | None,
    factor: float | None,
    target_length: int | None,
    lengths: str,
    data: str,
    column: str,
    split: str,
    subset: str | None,
    pieces: bool,
    max_documents: int | None,
    dtype: str,
    device: str,
    chunk_size: int,
    model_name: str | None,
    seed: int,
    output: Path | None,
    **_: Any,
) -> None:
    """Evaluates and shows; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RopeScalingError("Evaluation needs matplotlib and datasets: pip install 'rope-scaling[eval]'.")
    runner = importlib.import_module("rope_scaling.eval.run")
    texts = importlib.import_module("rope_scaling.eval.documents")
    named = importlib.import_module("rope_scaling.eval.methods")
    from transformers.utils import logging

    from rope_scaling.hf.describe import read_description
    from rope_scaling.hf.loading import load_model, load_tokenizer
    from rope_scaling.hf.patch import unpatch
    from rope_scaling.texts import read_texts

    logging.disable_progress_bar()
    specs = [named.parse_method(text) for text in methods or ()]
    loaded, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    if saved := named.saved_method(loaded):
        # The baselines are those of the model that the patch was made for, with the weights it has now.
        unpatch(loaded)
        specs = [saved, *specs]
    trained = max(slot.reach for slot in read_description(loaded).slots)
    tokens = texts.parse_lengths(lengths.split(","), trained)
    runner.check_lengths(tokens)
    config = runner.EvaluationConfig(
        model=model_name or model,
        data=data,
        lengths=tokens,
        trained_length=trained,
        factor=_factor(factor, target_length, tokens[-1], trained),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        chunk_size=chunk_size,
        seed=seed,
    )
    specs = specs or named.default_methods(model, config.factor)
    sources = read_texts(data, column=column, split=split, subset=subset)
    documents = texts.make_documents(sources, tokenizer, tokens, pieces=pieces, max_documents=max_documents)
    # Runs of other settings go to other folders, so that only a given folder can hold another run's rows.
    name = f"evaluate-{Path(config.model).name}-{runner.settings_sha256(config, documents)}"
    folder = output or Path("runs") / name
    rows, curves = _with_progress(runner, loaded, documents, specs, config, folder)
    _show(rows, curves, documents, folder)


def _factor(factor: float | None, target_length: int | None, longest: int, trained: int) -> float:
    if factor is not None and target_length is not None:
        raise RopeScalingError("Give `--factor` or `--target-length`, not both.")
    if target_length is not None and target_length < trained:
        raise RopeScalingError(f"`--target-length` is {target_length}, but the model reads {trained} tokens as it is.")
    if target_length is not None:
        return target_length / trained
    return check_number("factor", factor, at_least=1.0) if factor is not None else max(longest / trained, 1.0)


def _with_progress(
    runner: Any, model: Any, documents: Any, specs: list, config: Any, folder: Path
) -> tuple[list, list]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(len(document.ids) for document in documents.items) * (len(specs) + 2)
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=total, rate="")

        def advance(label: str, tokens: int) -> None:
            done = bars.tasks[0].completed + tokens
            bars.update(bar, advance=tokens, description=label, rate=f"{done / (time.monotonic() - started):,.0f}")

        try:
            return runner.evaluate(model, documents, specs, config, folder, advance)
        except KeyboardInterrupt:
            bars.stop()
            print("Interrupted. The same command resumes where it stopped.", file=sys.stderr)
            raise


def _show(rows: list, curves: list, documents: Any, folder: Path) -> None:
    from rich.console import Console

    report = importlib.import_module("rope_scaling.eval.report")
    (folder / "table.md").write_text(report.markdown_tables(rows), encoding="utf-8")
    values = {curve.label: curve.values for curve in curves}
    report.plot_curves(
        values, rows[0]["trained_length"], f"Loss by position: {rows[0]['model']}", folder / "curves.png"
    )
    console = Console()
    report.print_tables(rows, console)
    if documents.skipped:
        console.print(f"{documents.skipped} documents were shorter than the shortest length and skipped.")
    console.print(f"Rows, curves, table and plot: {folder}", soft_wrap=True)
