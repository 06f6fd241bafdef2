"""Two pictures of a device's results: where each stands under the roofline, and how far the best peer is."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.reporting.records import Result
from benchmarks.reporting.tables import label
from benchmarks.reporting.targets import best_peer

STYLES = ("-", "--", ":", "-.")
MAX_DECADES = 1.5  # of ratios; over more of them ticks would touch
MAX_BARS = 40  # results with the largest shapes first; the tables have them all


def roofline(results: Sequence[Result], device: str) -> Figure:
    """One mark a result: arithmetic against intensity, and, for what only moves data, bandwidth alone."""
    products = [result for result in results if "TFLOP/s" in result and "GB/s" in result]
    copies = [result for result in results if "TFLOP/s" not in result and "GB/s" in result]
    panels = [(_bandwidth, copies, 1), (_intensity, products, 3)]
    shown = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4 + 3 * sum(width for _, _, width in shown), 5.5), layout="constrained")
    is_any_warm = any(result.get("bound") == "cache" for result in results)
    note = " (hollow: from a cache)" if is_any_warm else ""
    figure.suptitle(f"{device}: results and the ceilings of the same run{note}")
    if shown:
        ratio = [width for _, _, width in shown]
        (row,) = figure.subplots(1, len(shown), width_ratios=ratio, squeeze=False)
        for axes, (draw, found, _) in zip(row, shown, strict=True):
            draw(axes, found)
    return figure


def _bandwidth(axes: Axes, results: Sequence[Result]) -> None:
    ops = sorted({str(result["op"]) for result in results})
    for place, op in enumerate(ops):
        for is_warm, fill in ((False, "full"), (True, "none")):
            mine = [result for result in results if result["op"] == op]
            heights = [result["GB/s"] for result in mine if (result.get("bound") == "cache") == is_warm]
            axes.plot([place] * len(heights), heights, "o", color=f"C{place}", fillstyle=fill)
    ceilings = [result["ceiling_GB/s"] for result in results if "ceiling_GB/s" in result]
    if ceilings:
        axes.axhline(float(np.median(ceilings)), color="black", label="ceiling: a copy")
        axes.legend(handles=axes.lines[-1:], fontsize=8)
    axes.set(
        title="data movement", ylabel="GB/s", xticks=range(len(ops)), yscale="log" if results else "linear"
    )
    axes.set_xticklabels(ops, rotation=60, ha="right", fontsize=8)


def _intensity(axes: Axes, results: Sequence[Result]) -> None:
    for op in sorted({str(result["op"]) for result in results}):
        mine = [result for result in results if result["op"] == op]
        intensity = [1e3 * result["TFLOP/s"] / result["GB/s"] for result in mine]
        axes.plot(intensity, [result["TFLOP/s"] for result in mine], "o", label=op)
    roofs = [result for result in results if "ceiling_GB/s" in result and "ceiling_TFLOP/s" in result]
    axes.set(title="roofline", xlabel="FLOP per byte", ylabel="TFLOP/s")
    for place, dtype in enumerate(sorted({str(roof.get("dtype", "")) for roof in roofs})):
        alike = [roof for roof in roofs if str(roof.get("dtype", "")) == dtype]
        bandwidth = float(np.median([result["ceiling_GB/s"] for result in alike])) / 1e3
        peak = float(np.median([result["ceiling_TFLOP/s"] for result in alike]))
        ridge = peak / bandwidth
        x = np.geomspace(ridge / 1e3, ridge * 30, 200)
        roof = np.minimum(peak, bandwidth * x)
        style = STYLES[place % len(STYLES)]
        axes.plot(x, roof, style, color="black", label=f"ceilings {dtype}".strip())
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)


def ratios(results: Iterable[Result], device: str) -> Figure:
    """A bar a result, from 1, which is ours, to its quickest peer's time over ours; tables have all peers."""
    found = [(result, best_peer(result)) for result in results]
    compared = [(result, peer) for result, peer in found if peer is not None]
    compared.sort(key=lambda pair: -float(pair[0]["us"]))
    compared = sorted(compared[:MAX_BARS], key=lambda pair: label(pair[0]))
    figure = Figure(figsize=(11, 2.0 + 0.22 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for name in sorted({name for _, (name, _) in compared}):
        rows = [row for row, (_, peer) in enumerate(compared) if peer[0] == name]
        widths = [compared[row][1][1] - 1 for row in rows]
        axes.barh(rows, widths, left=1, height=0.7, label=name)
    axes.axvline(1.0, color="black")
    axes.set(
        title=device,
        xlabel="the quickest peer's time / ours (right of the line: ours is quicker)",
        xscale="log",
        yticks=range(len(compared)),
        yticklabels=[label(result) for result, _ in compared],
    )
    _tick_ratios(axes, [ratio for _, (_, ratio) in compared])
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    if compared:
        axes.legend(fontsize=8)
    return figure


def _tick_ratios(axes: Axes, found: Sequence[float]) -> None:
    """Plain numbers, close enough together that a bar can be read."""
    low, high = min([1.0, *found]), max([1.0, *found])
    is_wide = np.log10(high / low) > MAX_DECADES
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_wide else (1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """As PNG, without what would make two pictures of the same results differ."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
