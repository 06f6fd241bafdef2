"""What GRPO made of a model, by each signal it learnt from: figures with intervals, and a picture.

The picture is after Figure 3 of DeepSeek-Coder-V2: pass@1 over the steps, learnt from a reward model's scores
and from raw test results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dscoder.eval.pass_at_k import Interval, paired_difference
from dscoder.eval.task_score import Answered, TaskScore
from dscoder.runtime.log import get_logger

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError:  # the extra "pretrain" is not installed
    Figure = None  # type: ignore[assignment,misc]

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """pass@1 on the watched problems over the steps of a run."""

    steps: tuple[int, ...]
    rates: tuple[Interval, ...]


def rates_of(answered: Sequence[Answered]) -> dict[str, float]:
    """pass@1 of the draws, by problem, where some were judged."""
    return {item.problem: item.pass_rate for item in answered if item.pass_rate is not None}


def compare(first: Sequence[Answered], second: Sequence[Answered]) -> Interval:
    """How much more of the draws pass in the second, over the problems that were judged in both."""
    before, after = rates_of(first), rates_of(second)
    both = [problem for problem in before if problem in after]
    return paired_difference([before[name] for name in both], [after[name] for name in both])


def draw_signals(curves: Mapping[str, Curve], scores: Mapping[str, TaskScore], path: Path) -> bool:
    """Draw the curves and, beside them, the final figures; False, with a remark, without matplotlib."""
    if Figure is None:
        _LOG.warning("matplotlib is not installed: no picture (pip install 'dscoder[pretrain]')")
        return False
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_curves(left, curves)
    _draw_scores(right, scores)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
    return True


def _draw_curves(axes: "Axes", curves: Mapping[str, Curve]) -> None:
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        means = [rate.mean for rate in curve.rates]
        axes.plot(curve.steps, means, color=colour, marker="o", markersize=4, label=name)
        low, high = [rate.low for rate in curve.rates], [rate.high for rate in curve.rates]
        axes.fill_between(curve.steps, low, high, color=colour, alpha=0.15)
    axes.set_xlabel("steps of GRPO")
    axes.set_ylabel("pass@1")
    axes.set_title("validation problems, draws at temperature 1")
    axes.legend(title="learnt from")
    axes.grid(alpha=0.3)


def _draw_scores(axes: "Axes", scores: Mapping[str, TaskScore]) -> None:
    names = list(scores)
    for offset, what, marker in ((-0.1, "drawn", "o"), (0.1, "greedy", "s")):
        found = [score.sampled if what == "drawn" else score.greedy for score in scores.values()]
        places = [idx + offset for idx, rate in enumerate(found) if rate is not None]
        rates = [rate for rate in found if rate is not None]
        spans = [[rate.mean - rate.low for rate in rates], [rate.high - rate.mean for rate in rates]]
        means = [rate.mean for rate in rates]
        axes.errorbar(places, means, yerr=spans, fmt=marker, capsize=4, label=what)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_title("test problems, 95 % intervals")
    axes.legend()
    axes.grid(alpha=0.3)
