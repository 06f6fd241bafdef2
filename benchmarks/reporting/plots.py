"""Two pictures of a device's results: where each stands under the roofline, and how far each peer is."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.reporting.records import Result
from benchmarks.reporting.tables import label

MAX_BARS = 40  # results with the largest shapes first; the tables have them all


def roofline(results: Sequence[Result], device: str) -> Figure:
    """One mark a result: arithmetic against intensity, and, for what only moves data, bandwidth alone."""
    products = [result for result in results if "TFLOP/s" in result and "GB/s" in result]
    copies = [result for result in results if "TFLOP/s" not in result and "GB/s" in result]
    panels = [(_bandwidth, copies, 1), (_intensity, products, 3)]
    shown = [panel for panel in panels if panel[1]]
    figure = Figure(figsize=(4 + 3 * sum(width for _, _, width in shown), 5.5), layout="constrained")
    figure.suptitle(f"{device}: results under the ceilings measured in the same run")
    if shown:
        ratio = [width for _, _, width in shown]
        (row,) = figure.subplots(1, len(shown), width_ratios=ratio, squeeze=False)
        for axes, (draw, found, _) in zip(row, shown, strict=True):
            draw(axes, found)
    return figure


def _bandwidth(axes: Axes, results: Sequence[Result]) -> None:
    ops = sorted({str(result["op"]) for result in results})
    for place, op in enumerate(ops):
        heights = [result["GB/s"] for result in results if result["op"] == op]
        axes.plot([place] * len(heights), heights, "o", label=op)
    ceilings = [result["ceiling_GB/s"] for result in results if "ceiling_GB/s" in result]
    if ceilings:
        axes.axhline(float(np.median(ceilings)), color="black", label="copy")
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
    if roofs:
        bandwidth = float(np.median([result["ceiling_GB/s"] for result in roofs])) / 1e3
        peak = float(np.median([result["ceiling_TFLOP/s"] for result in roofs]))
        ridge = peak / bandwidth
        x = np.geomspace(ridge / 1e3, ridge * 30, 200)
        axes.plot(x, np.minimum(peak, bandwidth * x), color="black", label="ceilings")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)


def ratios(results: Iterable[Result], device: str) -> Figure:
    """Bars from 1, which is ours, to each peer's time over ours; a group a result."""
    compared = [result for result in results if _ratios(result)]
    compared.sort(key=lambda result: -float(result["us"]))
    compared = sorted(compared[:MAX_BARS], key=label)
    peers = sorted({name for result in compared for name in _ratios(result)})
    figure = Figure(figsize=(11, 2.5 + 0.18 * len(compared) * max(1, len(peers))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(peers))
    for place, name in enumerate(peers):
        rows = [row for row, result in enumerate(compared) if name in _ratios(result)]
        widths = [_ratios(compared[row])[name] - 1 for row in rows]
        axes.barh([row + place * height for row in rows], widths, left=1, height=height, label=name)
    axes.axvline(1.0, color="black")
    axes.set(xlabel="peer's time / ours (right of the line: ours is quicker)", title=device, xscale="log")
    axes.margins(y=0.01)
    axes.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(compared))], [label(one) for one in compared]
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    if peers:
        axes.legend(fontsize=8)
    return figure


def _ratios(result: Result) -> dict[str, float]:
    return {name: peer["ratio"] for name, peer in result.get("peers", {}).items() if "ratio" in peer}


def save(figure: Figure, path: Path) -> None:
    """As PNG, without what would make two pictures of the same results differ."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
