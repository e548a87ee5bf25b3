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
    suite: str | None,
    tasks: list[str] | None,
    methods: list[str] | None,
    data: str,
    column: str,
    split: str,
    subset: str | None,
    pieces: bool,
    max_documents: int | None,
    dtype: str,
    device: str,
    output: Path | None,
    original_length: int | None = None,
    made: list[Any] | None = None,
    fresh: bool = False,
    **settings: Any,
) -> None:
    """Evaluates and shows; see the command's help for the arguments. `made` are task objects in the place of names.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    need_extra()
    runner = importlib.import_module("rope_scaling.eval.run")
    named = importlib.import_module("rope_scaling.eval.methods")
    kinds = importlib.import_module("rope_scaling.eval.tasks")
    from transformers.utils import logging

    from rope_scaling.hf.loading import check_language_model, load_model, load_tokenizer
    from rope_scaling.hf.patch import unpatch
    from rope_scaling.hf.sinusoidal_tables import lengthen_tables
    from rope_scaling.texts import read_texts

    logging.disable_progress_bar()
    specs = asked = [named.parse_method(text) for text in methods or ()]
    chosen = made or _tasks(suite, tasks)
    state = runner.process_state()
    if device == "auto" and state.num_processes > 1:
        device = str(state.device)
    check_language_model(model)
    loaded, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    if saved := named.saved_method(loaded):
        # The baselines are the model without the patch, with the weights it has now.
        unpatch(loaded)
        original_length = original_length or saved.arguments["original_max_position_embeddings"]
        specs = [saved, *specs]
    config = _config(loaded, model=model, data=data, original_length=original_length, **settings)
    if settings["factor"] is not None or settings["target_length"] is not None:
        named.check_extent(loaded, [spec.trained_at(original_length) for spec in asked], config.factor)
    lengthen_tables(loaded, config.lengths[-1])
    swept = not specs
    specs = named.with_yarn(specs or named.default_methods(model, config.factor), config.factor)
    specs = [spec.trained_at(original_length) for spec in specs]
    if swept:
        specs = _applicable(named, loaded, specs, config.factor, state.is_main_process)
    source = kinds.Source(
        lambda: read_texts(data, column=column, split=split, subset=subset),
        tokenizer,
        pieces=pieces,
        max_documents=max_documents,
        folder=output if state.is_main_process else None,
        fresh=fresh,
    )
    work = kinds.prepare(chosen, source, config, loaded)
    # Runs of other settings go to other folders, so that only a given folder can hold another run's rows.
    folder = output or Path("runs") / f"evaluate-{Path(config.model).name}-{runner.settings_sha256(config, work)}"
    measured = _with_progress(runner, loaded, work, specs, config, folder, fresh)
    if state.is_main_process:
        _show(folder, max(work, key=lambda one: one.skipped))
        _say_what_was_found(measured, folder)


def _applicable(named: Any, loaded: Any, specs: list[Any], factor: float, shown: bool) -> list[Any]:
    """The methods of a sweep that the model takes; which it does not, and why, is said."""
    specs, refused = named.applicable(loaded, specs, factor)
    if refused and shown:
        reason = next(iter(refused.values()))
        print(f"rope-scaling: {len(refused)} methods left out ({', '.join(refused)}): {reason}", file=sys.stderr)
    return specs


def _tasks(suite: str | None, tasks: list[str] | None) -> list[Any]:
    """The tasks of a suite and those named beside it; perplexity if there are none."""
    suites = importlib.import_module("rope_scaling.eval.suites")
    chosen = [*(suites.read_suite(suite) if suite else []), *map(suites.parse_task, tasks or ())]
    chosen = chosen or [suites.make_task("perplexity", {})]
    suites.check_tasks(chosen)
    return chosen


def _config(
    loaded: Any,
    *,
    model: str,
    data: str,
    lengths: str,
    factor: float | None,
    target_length: int | None,
    original_length: int | None,
    chunk_size: int,
    model_name: str | None,
    seed: int,
    **_: Any,
) -> Any:
    from rope_scaling.hf.pretrained_rope import pretrained_settings, read_pretrained
    from rope_scaling.hf.rotary import rotary_slots

    settings = importlib.import_module("rope_scaling.eval.config")
    trained = max(
        read_pretrained(slot, pretrained_settings(slot.config), original_length).reach for slot in rotary_slots(loaded)
    )
    tokens = importlib.import_module("rope_scaling.eval.documents").parse_lengths(lengths.split(","), trained)
    settings.check_lengths(tokens)
    return settings.EvaluationConfig(
        model=model_name or model,
        data=data,
        lengths=tokens,
        trained_length=trained,
        factor=_factor(factor, target_length, tokens[-1], trained),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        chunk_size=chunk_size,
        seed=seed,
        weights_sha256=importlib.import_module("rope_scaling.eval.identity").weights_sha256(loaded),
    )


def _factor(factor: float | None, target_length: int | None, longest: int, trained: int) -> float:
    if factor is not None and target_length is not None:
        raise RopeScalingError("Give `--factor` or `--target-length`, not both.")
    if target_length is not None and target_length < trained:
        raise RopeScalingError(f"`--target-length` is {target_length}, but the model reads {trained} tokens as it is.")
    if target_length is not None:
        return target_length / trained
    return check_number("factor", factor, at_least=1.0) if factor is not None else max(longest / trained, 1.0)


def need_extra() -> None:
    """Raises `RopeScalingError` if what evaluation needs is not installed."""
    missing = [
        name for name in ("matplotlib", "datasets", "pydantic", "scipy") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise RopeScalingError(f"Evaluation needs {' and '.join(missing)}: pip install 'rope-scaling[eval]'.")


def _with_progress(
    runner: Any, model: Any, work: list, specs: list, config: Any, folder: Path, fresh: bool
) -> list[Any]:
    """What was measured of each method."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(item.cost for one in work for item in one.items) * (len(specs) + 2)
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.fields[rate]} tokens/s"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    shown = runner.process_state().is_main_process
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
            _, measured = runner.evaluate(model, work, specs, config, folder, advance, fresh)
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


def _say_what_was_found(measured: list[Any], folder: Path) -> None:
    found = sum(method.found for method in measured)
    if found:
        total = sum(len(scores) for method in measured for scores in method.scores.values())
        print(
            f"{found} of {total} scores were found in {folder}, measured before with the same weights, settings and "
            "versions. `--fresh` measures them anew."
        )


def _show(folder: Path, most: Any) -> None:
    from rich.console import Console

    tables = importlib.import_module("rope_scaling.eval.report")
    run = importlib.import_module("rope_scaling.eval.page").read_run(folder)
    (folder / "table.md").write_text(tables.markdown_tables(run.rows), encoding="utf-8")
    for name, image in run.plots():
        (folder / f"{name}.png").write_bytes(image)
    console = Console()
    tables.print_tables(run.rows, console)
    if most.skipped:
        console.print(f"Documents skipped because they {most.task.skipped_because}: {most.skipped}.")
    console.print(f"Rows, scores, tables and plots: {folder}. One page: rope-scaling report {folder}", soft_wrap=True)
