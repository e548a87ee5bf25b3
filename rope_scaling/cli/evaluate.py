"""The work of `rope-scaling evaluate`: from options to a table, a plot and rows."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_scaling.errors import RopeScalingError, check_number


if TYPE_CHECKING:
    from rope_scaling.eval.config import EvaluationConfig
    from rope_scaling.eval.methods import MethodSpec
    from rope_scaling.eval.run import Measured
    from rope_scaling.eval.tasks import Task, Work


_PREPARED = Path("runs") / "prepared"
"""Where tasks keep what they prepare if no output folder is given: a run's own is named by what was prepared."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that `evaluate` and `harness` share; see the help of the commands."""

    model: str
    methods: list[str]
    lengths: str
    factor: float | None
    target_length: int | str | None
    """Tokens, or a multiple such as `8x` of what the model reads as loaded."""
    original_length: int | None
    dtype: str
    device: str
    chunk_size: int = 2048
    model_name: str | None
    seed: int
    output: Path | None
    fresh: bool


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which texts are read, and how they are cut; see the help of `evaluate`."""

    data: str
    column: str = "text"
    split: str = "test"
    subset: str | None = None
    pieces: bool = False
    max_documents: int | None = None


def run(options: RunOptions, texts: TextOptions, suite: str | None, tasks: list[str]) -> None:
    """Evaluates the tasks of a suite and those named beside it, and shows what came out.

    Raises:
        RopeScalingError: anything that the user can fix.
    """
    need_extra()
    from rope_scaling.eval.methods import parse_method

    methods = [parse_method(text) for text in options.methods]
    evaluate_tasks(options, texts, methods, _named_tasks(suite, tasks))


def need_extra() -> None:
    """Raises `RopeScalingError` if what evaluation needs is not installed."""
    from rope_scaling.eval.extras import need

    need("Evaluation", "eval", "matplotlib", "datasets", "pydantic", "scipy")


def _named_tasks(suite: str | None, tasks: list[str]) -> list[Task]:
    """The tasks of a suite and those named beside it; perplexity if there are none."""
    from rope_scaling.eval.suites import check_tasks, make_task, parse_task, read_suite

    named = [*(read_suite(suite) if suite else []), *map(parse_task, tasks)] or [make_task("perplexity", {})]
    check_tasks(named)
    return named


def evaluate_tasks(options: RunOptions, texts: TextOptions, methods: list[MethodSpec], tasks: list[Task]) -> None:
    """Loads the model, evaluates the methods by the tasks, and shows what came out.

    Raises:
        RopeScalingError: anything that the user can fix.
    """
    from transformers.utils import logging

    from rope_scaling.eval.methods import check_extent
    from rope_scaling.eval.run import process_state, settings_sha256
    from rope_scaling.hf.loading import check_language_model, load_tokenizer
    from rope_scaling.hf.sinusoidal_tables import lengthen_tables

    logging.disable_progress_bar()
    main_process = process_state().is_main_process
    check_language_model(options.model)
    model, saved = _load(options)
    tokenizer = load_tokenizer(options.model)
    original_length = options.original_length
    if saved is not None:
        original_length = original_length or saved.arguments["original_max_position_embeddings"]
    config = _config(model, options, texts.data, original_length)
    if options.factor is not None or options.target_length is not None:
        check_extent(model, [spec.trained_at(original_length) for spec in methods], config.factor)
    lengthen_tables(model, config.lengths[-1])
    specs = _methods(model, options.model, [saved, *methods] if saved else methods, config.factor, original_length)
    work = _prepare(options, texts, tasks, tokenizer, config, model)
    # Runs of other settings go to other folders, so that only a given folder can hold another run's rows.
    name = f"evaluate-{Path(config.model).name}-{settings_sha256(config, work)}"
    folder = options.output or Path("runs") / name
    measured = _with_progress(model, work, specs, config, folder, options.fresh)
    if main_process:
        _show(folder, max(work, key=lambda part: part.skipped))
        _say_what_was_found(measured, folder)


def _load(options: RunOptions) -> tuple[Any, MethodSpec | None]:
    """The model without the patch that it was saved with, and that patch; the baselines have the same weights."""
    from rope_scaling.eval.methods import saved_method
    from rope_scaling.eval.run import process_state
    from rope_scaling.hf.loading import load_model
    from rope_scaling.hf.patch import unpatch

    state = process_state()
    several = options.device == "auto" and state.num_processes > 1
    model = load_model(options.model, options.dtype, str(state.device) if several else options.device)
    if saved := saved_method(model):
        unpatch(model)
    return model, saved


def _methods(
    model: Any, name: str, specs: list[MethodSpec], factor: float, original_length: int | None
) -> list[MethodSpec]:
    """The methods to measure, YaRN among them; without any, those of a sweep that the model takes."""
    from rope_scaling.eval.methods import applicable, default_methods, with_yarn
    from rope_scaling.eval.run import process_state

    swept = not specs
    specs = with_yarn(specs or default_methods(name, factor), factor)
    specs = [spec.trained_at(original_length) for spec in specs]
    if not swept:
        return specs
    specs, refused = applicable(model, specs, factor)
    if refused and process_state().is_main_process:
        reason = next(iter(refused.values()))
        print(f"rope-scaling: {len(refused)} methods left out ({', '.join(refused)}): {reason}", file=sys.stderr)
    return specs


def _prepare(
    options: RunOptions, texts: TextOptions, tasks: list[Task], tokenizer: Any, config: EvaluationConfig, model: Any
) -> list[Work]:
    """The tasks with their items."""
    from rope_scaling.eval.run import process_state
    from rope_scaling.eval.tasks import Source, prepare
    from rope_scaling.texts import read_texts

    source = Source(
        lambda: read_texts(texts.data, column=texts.column, split=texts.split, subset=texts.subset),
        tokenizer,
        pieces=texts.pieces,
        max_documents=texts.max_documents,
        folder=options.output or _PREPARED if process_state().is_main_process else None,
        fresh=options.fresh,
    )
    return prepare(tasks, source, config, model)


def _config(model: Any, options: RunOptions, data: str, original_length: int | None) -> EvaluationConfig:
    from rope_scaling.eval.config import EvaluationConfig, check_lengths
    from rope_scaling.eval.documents import parse_lengths
    from rope_scaling.eval.scoring.identity import weights_sha256
    from rope_scaling.hf.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(model, original_length)
    trained = max(checkpoint.rope(slot).reach for slot in checkpoint.slots)
    lengths = parse_lengths(options.lengths.split(","), trained)
    check_lengths(lengths)
    return EvaluationConfig(
        model=options.model_name or options.model,
        data=data,
        lengths=lengths,
        trained_length=trained,
        factor=_factor(options.factor, options.target_length, lengths[-1], trained),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        chunk_size=options.chunk_size,
        seed=options.seed,
        weights_sha256=weights_sha256(model),
    )


def _factor(factor: float | None, target_length: int | str | None, longest: int, trained: int) -> float:
    from rope_scaling.lengths import in_tokens

    if factor is not None and target_length is not None:
        raise RopeScalingError("Give `--factor` or `--target-length`, not both.")
    if target_length is not None:
        length = in_tokens("target_length", target_length, trained)
        if length < trained:
            raise RopeScalingError(f"`--target-length` is {length}, but the context length as loaded is {trained}.")
        return length / trained
    return check_number("factor", factor, at_least=1.0) if factor is not None else max(longest / trained, 1.0)


def _with_progress(
    model: Any, work: list[Work], specs: list[MethodSpec], config: EvaluationConfig, folder: Path, fresh: bool
) -> list[Measured]:
    """What was measured of each method."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from rope_scaling.eval.run import evaluate, process_state

    total = sum(item.cost for part in work for item in part.items) * (len(specs) + 2)
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    shown = process_state().is_main_process
    console = Console(stderr=True)
    lines = _Lines(total) if shown and not console.is_terminal else None
    with Progress(*columns, console=console, transient=True, disable=not shown or lines is not None) as bars:
        bar = bars.add_task("", total=total, rate="")

        def advance(label: str, tokens: int) -> None:
            done = bars.tasks[0].completed + tokens
            bars.update(bar, advance=tokens, description=label, rate=f"{done / (time.monotonic() - started):,.0f}")
            if lines is not None:
                lines.advance(label, tokens)

        try:
            _, measured = evaluate(model, work, specs, config, folder, advance, fresh)
        except KeyboardInterrupt:
            bars.stop()
            again = " without `--fresh`" if fresh else ""
            print(f"Interrupted. The same command{again} resumes where it stopped.", file=sys.stderr)
            raise
    return measured


class _Lines:
    """Progress for a log: a line when a method begins, and one every half minute."""

    def __init__(self, total: int):
        self.total, self.done, self.label = total, 0, ""
        self.started = self.told = time.monotonic()

    def advance(self, label: str, tokens: int) -> None:
        """Tokens of one item were scored."""
        self.done += tokens
        now = time.monotonic()
        if label != self.label or now - self.told > 30:
            self.label, self.told = label, now
            left = (now - self.started) * (self.total / self.done - 1)
            print(
                f"{self.done / self.total:4.0%}  {label}, about {left / 60:.1f} minutes left",
                file=sys.stderr,
                flush=True,
            )


def _say_what_was_found(measured: list[Measured], folder: Path) -> None:
    reused = sum(method.found for method in measured)
    if reused:
        total = sum(len(scores) for method in measured for scores in method.scores.values())
        print(
            f"{reused} of {total} scores were found in {folder}, measured before with the same weights, settings and "
            "versions. `--fresh` measures them again."
        )


def _show(folder: Path, most: Work) -> None:
    from rich.console import Console

    from rope_scaling.eval.report.reading import read_run
    from rope_scaling.eval.report.tables import markdown_tables, print_tables

    finished = read_run(folder)
    (folder / "table.md").write_text(markdown_tables(finished.rows), encoding="utf-8")
    for plot in finished.plots():
        (folder / f"{plot.name}.png").write_bytes(plot.data)
    console = Console()
    print_tables(finished.rows, console)
    if most.skipped:
        console.print(f"Documents skipped because they {most.task.skipped_because}: {most.skipped}.")
    console.print(f"Rows, scores, tables and plots: {folder}. One page: rope-scaling report {folder}", soft_wrap=True)
