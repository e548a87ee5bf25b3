"""Numbers that papers give, beside a run of the same model and protocol."""

from __future__ import annotations

import json
from importlib import resources

from rope_scaling.eval.files import Row
from rope_scaling.eval.formatting import Table


def published_tables(rows: list[Row]) -> list[Table]:
    """Numbers that papers give for the model of some rows by a protocol that they were measured with."""
    model = rows[0]["model"].rpartition("/")[2].lower()
    measured = {row["task"] for row in rows}
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in published_rows():
        if model in row["models"] and row["protocol"] in measured:
            tables.setdefault((row["protocol"], f"{row['data']}, {row['source']}"), []).append(row)
    return [_table(protocol, where, own) for (protocol, where), own in tables.items()]


def _table(protocol: str, where: str, rows: list[Row]) -> Table:
    lengths = sorted({length for row in rows for length in map(int, row["perplexity"])})
    lines = [["method", *(f"{length}" for length in lengths)]]
    lines += [[row["method"], *(str(row["perplexity"].get(str(n), "")) for n in lengths)] for row in rows]
    return Table(f"Published, not measured here: {protocol} on {where}", lines)


def published_rows() -> list[Row]:
    """Numbers from papers, one JSON object a line of their tables."""
    text = (resources.files("rope_scaling.eval.report") / "published.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
