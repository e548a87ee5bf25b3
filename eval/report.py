"""Tables and plots, made from rows and curves alone."""

from __future__ import annotations

import math
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from rope_scaling.eval.methods import CROPPING, UNPATCHED


def length_name(length: int, trained_length: int) -> str:
    """`2x` for twice the trained length; other lengths by their tokens."""
    ratio = length / trained_length
    if length == 0:
        return "0"
    return f"{ratio:g}x" if ratio in (0.25, 0.5) or ratio == int(ratio) else f"{length}"


def bucket_names(rows: list[dict[str, Any]]) -> list[tuple[tuple[int, int], str]]:
    """The buckets that rows have, each with its name, in order."""
    buckets = sorted({(row["from"], row["to"]) for row in rows if row["measure"] == "bucket"})
    trained = rows[0]["trained_length"]
    return [(bucket, f"({length_name(bucket[0], trained)},{length_name(bucket[1], trained)}]") for bucket in buckets]


def perplexity_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one line a method: perplexity in every bucket of positions, then of all of the longest length."""
    longest, trained = rows[0]["lengths"][-1], rows[0]["trained_length"]
    columns = [("bucket", *bucket) for bucket, _ in bucket_names(rows)] + [("prefix", 0, longest)]
    names = [*(name for _, name in bucket_names(rows)), f"(0,{length_name(longest, trained)}]"]
    return [["method", *names]] + [
        [method, *("" if row is None else perplexity_text(row["nll"]) for row in found)]
        for method, found in _by_method(rows, columns)
    ]


def difference_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one line a method: paired difference to the unpatched model in the buckets around and beyond 1x."""
    trained = rows[0]["trained_length"]
    buckets = [bucket for bucket in bucket_names(rows) if bucket[0][1] >= trained]
    buckets = buckets[:1] + buckets[-2:] if len(buckets) > 3 else buckets
    return [["method", *(name for _, name in buckets)]] + [
        [method, *("" if row is None else difference_text(row) for row in found)]
        for method, found in _by_method(rows, [("bucket", *bucket) for bucket, _ in buckets])
        if method != UNPATCHED
    ]


def _by_method(
    rows: list[dict[str, Any]], columns: list[tuple[str, int, int]]
) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Each method's rows for the columns: kind of measure, and the positions from and to."""
    found = {(row["method"], row["measure"], row["from"], row["to"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    return [(method, [found.get((method, *column)) for column in columns]) for method in methods]


def perplexity_text(nll: float) -> str:
    """Perplexity with two decimals, or fewer digits where it is large."""
    value = math.exp(min(nll, 700))
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def difference_text(row: dict[str, Any]) -> str:
    """A paired difference in nats, with its interval where there is one."""
    text = f"{row['difference']:+.2f}"
    return (
        text
        if row["difference_low"] is None
        else f"{text} [{row['difference_low']:+.2f},{row['difference_high']:+.2f}]"
    )


def conditions(rows: list[dict[str, Any]]) -> str:
    """One line that says under which conditions the numbers hold."""
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(row["versions"].items()))
    count = max(r["documents"] for r in rows)
    return (
        f"{row['model']}, trained length {row['trained_length']}, factor {row['factor']:g}, "
        f"{count} documents of {row['data']} ({row['documents_sha256']}), {row['dtype']} on {row['device']}, "
        f"chunks of {row['chunk_size']} tokens; {versions}"
    )


def markdown_tables(rows: list[dict[str, Any]]) -> str:
    """Both tables in Markdown, with their conditions under them."""
    texts = []
    for title, table in _titled(rows):
        lines = ["| " + " | ".join(cells) + " |" for cells in table]
        texts += [f"{title}:", "", lines[0], "|" + " --- |" + " ---: |" * (len(table[0]) - 1), *lines[1:], ""]
    return "\n".join([*texts, f"{conditions(rows)}.", ""])


def print_tables(rows: list[dict[str, Any]], console: Any) -> None:
    """Both tables in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for title, (header, *lines) in _titled(rows):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for cells in lines:
            table.add_row(*cells, style="bold" if cells[0] in (UNPATCHED, CROPPING) else None)
        console.print(table)
        console.print()
    console.print(f"{conditions(rows)}.")


def _titled(rows: list[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    return [
        (f"Perplexity by position, 1x = {rows[0]['trained_length']} tokens", perplexity_table(rows)),
        ("Difference to unpatched on the same tokens, nats a token, 95% interval", difference_table(rows)),
    ]


def plot_curves(curves: dict[str, list[np.ndarray]], trained_length: int, title: str, path: Path) -> None:
    """Loss against position, one line a method, on a logarithmic axis of positions.

    Args:
        curves (`dict` of label to list of `np.ndarray`): Loss at every position, one array `[T - 1]` a document.
        trained_length (`int`): Marked by a vertical line, in tokens.
        title (`str`): Written above the plot.
        path (`Path`): PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(5.6, 0.22 * len(curves))), layout="constrained")
    axes = figure.subplots()
    longest = max(len(curve) for values in curves.values() for curve in values)
    edges = np.unique(np.geomspace(max(trained_length / 8, 2), longest, 28).astype(int))
    # Every colour once with each kind of line, so that no number of methods runs out of them.
    styles = product(("-", "-.", ":"), colormaps["tab20"].colors)  # type: ignore[attr-defined]
    looks = cycle({"linestyle": line, "color": colour} for line, colour in styles)
    last = {}
    for label, values in curves.items():
        positions, losses = _binned(values, edges)
        style: dict[str, Any] = {"linewidth": 1.4}
        if label in (UNPATCHED, CROPPING):
            style = {"color": "black", "linestyle": "-" if label == UNPATCHED else "--", "linewidth": 2.2}
        axes.plot(positions, losses, label=label, **(next(looks) | style))
        last[label] = losses[-1]
    axes.axvline(trained_length, color="grey", linestyle=":")
    axes.annotate(
        "trained length", (trained_length, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
    )
    axes.set_xscale("log", base=2)
    ticks = [trained_length * 2**k for k in range(-3, 12) if edges[0] <= trained_length * 2**k <= longest * 1.01]
    axes.set_xticks(ticks, [f"{tick:g}\n{tick / trained_length:g}x" for tick in ticks])
    axes.set(xlabel="position, tokens", ylabel="loss, nats a token", title=title, xlim=(edges[0], longest * 1.01))
    axes.grid(alpha=0.3)
    # In the order in which the lines end, top to bottom, so that legend and lines can be matched by eye.
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -last[labels[i]])
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=9,
    )
    figure.savefig(path, dpi=130)


def _binned(values: list[np.ndarray], edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss over all documents in each bin of positions, at the bin's geometric middle."""
    positions, losses = [], []
    for low, high in pairwise(edges):
        inside = [curve[low:high] for curve in values if len(curve) > low]
        if inside:
            positions.append(math.sqrt(low * high) + 1)
            losses.append(float(np.concatenate(inside).mean()))
    return np.array(positions), np.array(losses)
