"""The work of `rope-scaling report`: rows of runs as a page, and a check that a script can rely on."""

from __future__ import annotations

import importlib
from pathlib import Path

from rope_scaling.cli.evaluate import need_extra
from rope_scaling.errors import RopeScalingError


def run(folders: list[Path], output: Path | None, mixed: bool, fail_if: list[str]) -> int:
    """Writes the report; see the command's help for the arguments.

    Returns:
        1 if a condition of `fail_if` is met, otherwise 0.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    need_extra()
    page = importlib.import_module("rope_scaling.eval.page")
    summary = importlib.import_module("rope_scaling.eval.summary")
    runs = page.read_runs(folders, mixed=mixed)
    failed = [line for one in runs for condition in fail_if for line in summary.failures(one.rows, condition)]
    target = output or (folders[0] if len(folders) == 1 else Path("runs") / "report")
    try:
        page.write_report(runs, target)
    except OSError as error:
        raise RopeScalingError(f"Cannot write the report to {str(target)!r}: {error.strerror}.") from None
    print(target / "report.html")
    for line in failed:
        print(f"Failed: {line}.")
    return 1 if failed else 0
