"""The work of `rope-scaling doctor`: the findings in colour, or as JSON, and an exit status for scripts."""

from __future__ import annotations

import dataclasses
import json
import sys

from rope_scaling.doctor import Diagnosis, diagnose
from rope_scaling.errors import RopeScalingError
from rope_scaling.lengths import in_tokens


_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def run(
    model: str, target_length: int | str | None, original_length: int | None, targets: list[str], as_json: bool
) -> None:
    """Shows what is found, and exits with status 1 if it is more than notes.

    Raises:
        RopeScalingError: there is nothing to read, or nothing that `target_length` could be a multiple of.
    """
    if isinstance(target_length, str):
        target_length = _in_tokens(target_length, model, original_length)
    diagnosis = diagnose(model, target_length, targets, original_length)
    if as_json:
        rows = [{**dataclasses.asdict(finding), "title": finding.title} for finding in diagnosis.findings]
        print(json.dumps(rows, indent=2))
    else:
        _show(diagnosis)
    sys.exit(0 if diagnosis.healthy else 1)


def _in_tokens(target_length: str, model: str, original_length: int | None) -> int:
    """A length such as `8x` in tokens, from what the checkpoint reads as loaded."""
    description = diagnose(model, original_max_position_embeddings=original_length).description
    if description is None:
        raise RopeScalingError(
            f"`--target-length {target_length}` is a multiple of the length that {model!r} reads, and its config does "
            "not tell. Give it in tokens, such as 32k."
        )
    return in_tokens("target_length", target_length, max(slot.reach for slot in description.slots))


def _show(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print(str(diagnosis.description or diagnosis.name), highlight=False, markup=False, soft_wrap=True)
    for one in diagnosis.findings:
        console.print()
        console.print(Text.assemble((f"{one.code} {one.level}", _COLOURS[one.level]), f"  {one.title}"))
        for text in (one.cause, one.fix):
            console.print(Padding(Text(text), (0, 0, 0, 2)))
    levels = [one.level for one in diagnosis.findings]
    counts = [f"{levels.count(level)} {level}s" for level in _COLOURS if level in levels]
    console.print(f"\n{', '.join(counts) or 'Nothing found'}.", highlight=False)
