"""The loss of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "pretrain" is not installed
    Figure = None  # type: ignore[assignment,misc]

BITS_PER_BYTE = "held_out_bits_per_byte"
HELD_OUT_LOSS = "held_out_loss"


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return Figure is not None


def plot_loss(reports: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the training loss over the tokens seen, and replace `path` by it.

    Beside it stand the held-out bits per byte where there are some, else the held-out loss.
    """
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
    name = BITS_PER_BYTE if any(BITS_PER_BYTE in report for report in reports) else HELD_OUT_LOSS
    held_out = [report for report in reports if name in report]
    if held_out:
        other = axes.twinx() if name == BITS_PER_BYTE else axes
        x, y = [r["tokens"] for r in held_out], [r[name] for r in held_out]
        drawn = other.plot(x, y, color="tab:orange", marker="o", markersize=4, label="held out")
        if other is not axes:
            other.set_ylabel("held-out bits per byte")
        handles += drawn
    axes.legend(handles=handles)
    axes.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
