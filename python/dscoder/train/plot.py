"""The loss of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "pretrain" is not installed
    Figure = None  # type: ignore[assignment,misc]

HELD_OUT = "held_out_bits_per_byte"


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return Figure is not None


def plot_loss(reports: Sequence[dict[str, float]], path: Path) -> None:
    """Draw training loss and held-out bits per byte over the tokens seen, and replace `path` by it."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [report for report in reports if "loss" in report]
    axes.plot(
        [r["tokens"] for r in trained], [r["loss"] for r in trained], color="tab:blue", label="training"
    )
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss (nats per token)")
    handles = list(axes.get_lines())
    held_out = [report for report in reports if HELD_OUT in report]
    if held_out:
        right = axes.twinx()
        x, y = [r["tokens"] for r in held_out], [r[HELD_OUT] for r in held_out]
        right.plot(x, y, color="tab:orange", marker="o", markersize=4, label="held out")
        right.set_ylabel("held-out bits per byte")
        handles += right.get_lines()
    axes.legend(handles=handles)
    axes.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
