"""The work of `rope-scaling report`: rows of runs as a page, and a check that a script can rely on."""

from __future__ import annotations

from pathlib import Path

from rope_scaling.cli.evaluate import need_extra
from rope_scaling.errors import RopeScalingError


def run(folders: list[Path], output: Path | None, mixed: bool, fail_if: list[str]) -> int:
    """Writes the report; see the command's help for the arguments.

    Returns:
        1 if a condition of `fail_if` is met, otherwise 0.

    Raises:
        RopeScalingError: anything that the user can fix.
    """
    need_extra()
    from rope_scaling.eval.report.html_page import write_report
    from rope_scaling.eval.report.joining import read_runs
    from rope_scaling.eval.report.summary import failures

    runs = read_runs(folders, mixed=mixed)
    failed = [line for finished in runs for condition in fail_if for line in failures(finished.rows, condition)]
    target = output or (folders[0] if len(folders) == 1 else Path("runs") / "report")
    try:
        write_report(runs, target)
    except OSError as error:
        raise RopeScalingError(f"Cannot write the report to {str(target)!r}: {error.strerror}.") from None
    print(target / "report.html")
    for line in failed:
        print(f"Failed: {line}.")
    return 1 if failed else 0
