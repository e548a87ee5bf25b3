"""Figures of rows and scores, as functions that tasks draw with."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from itertools import cycle, pairwise, product
from types import MappingProxyType
from typing import Any

import numpy as np

from rope_scaling.eval.methods import CROPPING, UNPATCHED
from rope_scaling.eval.stats import estimate


_BREAKS = 1.0
"""Nats above cropping at which a model has broken; such lines do not set the scale of a plot of losses."""
_MOST_BANDS = 8
"""With more methods than that, bands would cover each other."""


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def curves_figure(curves: dict[str, list[np.ndarray]], trained_length: int, title: str) -> Any:
    """Loss against position, one line a method, on a logarithmic axis of positions; below, the same less cropping.

    Lines of models that break are cut off above, and the legend says up to where they go. Few methods get bands, the
    95% interval over documents of each bin; those of differences are paired.

    Args:
        curves (`dict` of label to list of `np.ndarray`): Loss at every position, one array `[T - 1]` a document.
        trained_length (`int`): Marked by a vertical line, in tokens.
        title (`str`): Written above the plot.
    """
    from matplotlib.figure import Figure

    look = looks()
    styles = {label: look(label) for label in curves}
    differences = _less_cropping(curves)
    # Above, the hardness of the text sets most of the shape.
    panels = 2 if differences else 1
    figure = Figure(figsize=(10, max(5.6 * panels * 0.8, 0.22 * len(curves))), layout="constrained")
    above, *below = figure.subplots(panels, squeeze=False, sharex=True)[:, 0]
    longest = max(len(curve) for values in curves.values() for curve in values)
    edges = np.unique(np.geomspace(max(trained_length / 8, 2), longest, 28).astype(int))
    last = _draw(above, curves, edges, styles)
    cut = _cut_off(above)
    _legend(above, last, cut)
    above.annotate(
        "trained length", (trained_length, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
    )
    above.set(ylabel="loss, nats per token" + (", axis cut" if cut else ""), title=title)
    for axes in below:
        _draw(axes, differences, edges, styles)
        axes.axhline(0, **styles[CROPPING])
        axes.set(ylabel="difference to cropping, nats per token")
        _logarithmic_beyond_a_tenth(axes)
    for axes in (above, *below):
        axes.axvline(trained_length, color="grey", linestyle=":")
        axes.grid(alpha=0.3)
    ticks = [trained_length * 2**k for k in range(-3, 12) if edges[0] <= trained_length * 2**k <= longest * 1.01]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}\n{tick / trained_length:g}x" for tick in ticks])
    axes.set(xlabel="position, tokens", xlim=(edges[0], longest * 1.01))
    return figure


def _less_cropping(curves: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """What each method loses to cropping at every position; empty without methods or cropping."""
    cropping = curves.get(CROPPING, [])
    shape = [len(curve) for curve in cropping]
    others = {
        label: [own - crop for own, crop in zip(values, cropping, strict=True)]
        for label, values in curves.items()
        if label != CROPPING and [len(curve) for curve in values] == shape
    }
    return others if others.keys() - {UNPATCHED} else {}


def _draw(
    axes: Any, curves: dict[str, list[np.ndarray]], edges: np.ndarray, styles: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """A line for each of some curves, and where each ends."""
    last = {}
    for label, values in curves.items():
        positions, losses, lows, highs = _binned(values, edges)
        (line,) = axes.plot(positions, losses, label=label, **styles[label])
        if len(values) > 1 and len(curves) <= _MOST_BANDS:
            axes.fill_between(positions, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
        last[label] = losses[-1]
    return last


def _cut_off(axes: Any) -> dict[str, float]:
    """Ends the axis above the lines that stay near cropping; returns the others, each with its largest value."""
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    cropping = lines.get(CROPPING, np.zeros(0))
    near = {
        label: values
        for label, values in lines.items()
        if len(values) != len(cropping) or (values - cropping).max() <= _BREAKS
    }
    broken = {label: float(values.max()) for label, values in lines.items() if label not in near}
    if broken:
        lowest, highest = (end([end(values) for values in near.values()]) for end in (min, max))
        margin = 0.05 * (highest - lowest) + 0.05
        axes.set_ylim(min(lowest, *(lines[label].min() for label in broken)) - margin, highest + margin)
    return {label: value for label, value in broken.items() if value > axes.get_ylim()[1]}


def _logarithmic_beyond_a_tenth(axes: Any) -> None:
    """A model that collapses loses nats, one that reads on gains hundredths."""
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.autoscale(axis="y")


def lengths_figure(rows: list[dict[str, Any]], field: str, trained_length: int, title: str, label: str) -> Any:
    """One field of rows against the length, one line a method, with its intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, max(4.6, 0.22 * len({row["method"] for row in rows}))), layout="constrained")
    axes = figure.subplots()
    lengths = sorted({row["to"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    look, last = looks(), {}
    for index, method in enumerate(methods):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["to"])
        # Side by side, or error bars of equal values would hide each other.
        shift = 1.0 + 0.06 * (index - len(methods) / 2) / len(methods)
        places, values = [row["to"] * shift for row in own], np.array([row[field] for row in own])
        ends = [(row[f"{field}_low"], row[f"{field}_high"]) for row in own]
        bars = None
        if all(low is not None for low, _ in ends):
            low, high = np.array(ends).T
            bars = np.maximum([values - low, high - values], 0)
        axes.errorbar(places, values, yerr=bars, label=method, capsize=2, marker="o", markersize=3, **look(method))
        last[method] = float(values[-1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length}\n{length / trained_length:g}x" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="length, tokens", ylabel=label, title=title)
    if field == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    elif field == "gain":
        _logarithmic_beyond_a_tenth(axes)
    axes.grid(alpha=0.3)
    _legend(axes, last)
    return figure


def heat_figure(rows: list[dict[str, Any]], trained_length: int, title: str) -> Any:
    """Answers found, one panel a method: lengths across, depths down."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("to", "depth"))
    columns = min(len(methods), max(2, 12 // max(len(lengths), 2)))
    lines = math.ceil(len(methods) / columns)
    size = (max(1.1 * len(lengths) + 0.8, 2.6) * columns + 1, (0.28 * len(depths) + 1.0) * lines + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    by_cell = {(row["method"], row["to"], row["depth"]): row for row in rows}
    for axes, method in zip(panels, methods, strict=False):
        cells = [[by_cell.get((method, length, depth)) for length in lengths] for depth in depths]
        shares = np.array([[np.nan if row is None else row["accuracy"] for row in line] for line in cells])
        image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, x in np.ndindex(shares.shape):
            row = cells[y][x]
            if row is not None:
                axes.text(x, y, f"{row['correct']}/{row['asked']}", ha="center", va="center", fontsize=7)
        names = [f"{length / trained_length:g}x" for length in lengths]
        axes.set_xticks(range(len(lengths)), names)
        axes.set_yticks(range(len(depths)), [f"{depth:.2g}" for depth in depths], fontsize=7)
        axes.set_title(method, fontsize=9)
    for axes in panels[len(methods) :]:
        axes.axis("off")
    figure.colorbar(image, ax=panels.tolist(), label="accuracy", shrink=0.6)
    figure.suptitle(title)
    figure.supxlabel("length")
    figure.supylabel("depth of the needle, 0 = start of the text")
    return figure


def looks() -> Callable[[str], dict[str, Any]]:
    """How the line of a label looks; every colour once with each kind of line, so that no number of them runs out."""
    from matplotlib import colormaps

    styles = product(("-", "-.", ":"), colormaps["tab20"].colors)  # type: ignore[attr-defined]
    others = cycle({"linestyle": line, "color": colour, "linewidth": 1.4} for line, colour in styles)

    def look(label: str) -> dict[str, Any]:
        if label in (UNPATCHED, CROPPING):
            return {"color": "black", "linestyle": "-" if label == UNPATCHED else "--", "linewidth": 2.2}
        return next(others)

    return look


def _legend(axes: Any, last: dict[str, float], cut: Mapping[str, float] = MappingProxyType({})) -> None:
    """In the order in which the lines end, top to bottom, so that legend and lines can be matched by eye; of those
    that are cut off, with their largest value."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -last[labels[i]])
    axes.legend(
        [handles[i] for i in order],
        [f"{labels[i]} (up to {cut[labels[i]]:.1f})" if labels[i] in cut else labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=9,
    )


def _binned(values: list[np.ndarray], edges: np.ndarray) -> list[np.ndarray]:
    """Geometric middle of each bin of positions, mean loss of all documents in it, and the ends of its interval."""
    lines = []
    for low, high in pairwise(edges):
        inside = [curve[low:high] for curve in values if len(curve) > low]
        if inside:
            sums = np.array([part.sum(dtype=np.float64) for part in inside])
            mean = estimate(sums, np.array([float(len(part)) for part in inside]), seed=0)
            ends = [mean.mean if end is None else end for end in (mean.low, mean.high)]
            lines.append((math.sqrt(low * high) + 1, mean.mean, *ends))
    return list(np.array(lines).T)
