"""One table of several runs: what each trained, and the losses by position before and after.

python -m rope_scaling.recipes.report runs/recipes --output docs/results/recipes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.files import read_rows, write_rows
from rope_scaling.eval.formatting import bucket_names, difference_text, perplexity_text
from rope_scaling.recipes.card import markdown


Row = dict[str, Any]


def collect(folder: Path) -> list[Row]:
    """The rows of every finished run in a folder, run by run.

    Raises:
        RopeScalingError: there is none, or they were measured on different documents.
    """
    rows = [row for file in sorted(folder.glob("*/rows.jsonl")) for row in read_rows(file)]
    if not rows:
        raise RopeScalingError(f"No finished run in {str(folder)!r}: no folder there holds a `rows.jsonl`.")
    if len({row["documents_sha256"] for row in rows}) > 1:
        raise RopeScalingError(
            f"The runs in {str(folder)!r} were measured on different documents; they cannot share a table."
        )
    return rows


def tables(rows: list[Row]) -> str:
    """Perplexities before and after, then what training changed, in Markdown."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["recipe"], []).append(row)
    buckets = bucket_names(rows)
    trained = rows[0]["trained_length"]
    first = _index(rows)
    plain = [perplexity_text(first["unpatched", "unpatched", "bucket", *bucket]["nll"]) for bucket, _ in buckets]
    levels = [["recipe", "tokens", "minutes", *(name for _, name in buckets)], ["as loaded", "", "", *plain]]
    changes = [["recipe", "(0,1x], trained - as loaded"]]
    changes[0] += [f"{name}, trained - {what}" for _, name in buckets[-1:] for what in ("as loaded", "patched")]
    for recipe, its_rows in runs.items():
        found = _index(its_rows)
        cells = []
        for bucket, _ in buckets:
            pair = [found[stage, "unpatched", "bucket", *bucket]["nll"] for stage in ("before", "after")]
            cells.append(" → ".join(map(perplexity_text, pair)))
        facts = its_rows[0]
        levels.append([recipe, f"{facts['trained_tokens'] / 1e6:.2f}M", f"{facts['minutes']:.1f}", *cells])
        far = buckets[-1][0]
        three = [("unpatched", "prefix", 0, trained), ("unpatched", "bucket", *far), ("before", "bucket", *far)]
        changes.append([recipe, *(difference_text(found["after", *key]) for key in three)])
    facts = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
    count = max(row["documents"] for row in rows)
    return "\n".join(
        [
            f"Perplexity by position, patched → trained, 1x = {trained} tokens:",
            "",
            markdown(levels),
            "",
            "Differences in nats a token on the same tokens, 95% interval:",
            "",
            markdown(changes),
            "",
            f"{facts['model']}, {count} documents of {facts['data']} ({facts['documents_sha256']}); {versions}.",
            "",
        ]
    )


def _index(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    return {(row["stage"], row["against"], row["measure"], row["from"], row["to"]): row for row in rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the folders of runs")
    parser.add_argument("--output", type=Path, help="folder for rows.jsonl of all runs together")
    given = parser.parse_args(argv)
    try:
        rows = collect(given.folder)
    except RopeScalingError as error:
        sys.exit(f"rope-scaling: error: {error}")
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        write_rows(given.output / "rows.jsonl", rows)
    print(tables(rows))


if __name__ == "__main__":
    main()
