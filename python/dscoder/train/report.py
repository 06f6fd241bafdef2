"""What a run shows and keeps while it goes: a progress bar, metrics, TensorBoard events, a picture."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dscoder.config.train import ReportConfig
from dscoder.runtime.log import console, get_logger
from dscoder.train.metrics import METRICS, MetricsWriter, has_tensorboard, read_metrics
from dscoder.train.plot import has_matplotlib, plot_loss
from dscoder.train.stopwatch import Stopwatch

LOSS_PICTURE = "loss.png"
_STEPS = "steps of "  # before a figure's name: how many of the steps that wait for a report have it
# Of a report's figures, those in the line that a reader follows.
_SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "reward": "reward {:.3f}",
    "lr": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
    "expert_load_max": "load x{:.2f}",
    "rank_load_max": "rank load x{:.2f}",
    "exchange": "exchange {:.1%}",
    "dropped_share": "dropped {:.1%}",
}
_INSTALL = "pip install 'dscoder[pretrain]'"
_LOG = get_logger(__name__)

OnMetrics = Callable[[Mapping[str, float]], None]


def wants(choice: str, *, is_there: bool, what: str) -> bool:
    """Whether an optional part is used: `on` without it is an error, `auto` without it a remark."""
    if choice == "off" or is_there:
        return choice != "off"
    if choice == "on":
        raise ValueError(f"{what} must be installed for report.{what} = on ({_INSTALL})")
    _LOG.warning("%s is not installed: the run goes on without it (%s)", what, _INSTALL)
    return False


def short_line(report: Mapping[str, float]) -> str:
    """The figures of a report that a reader follows, on one line.

    "load" is the busiest expert's load over the mean, "rank load" the busiest rank's where several share the
    experts out, of the worst layer; "exchange" the share of the time in dispatch and combine.
    """
    figures = dict(report)
    if "dispatch_share" in report:
        figures["exchange"] = report["dispatch_share"] + report["combine_share"]
    if not report.get("dropped_share"):
        figures.pop("dropped_share", None)  # most models drop nothing
    return "  ".join(form.format(figures[name]) for name, form in _SHOWN.items() if name in figures)


class RunReport:
    """Everything a run reports; use as a context manager round the steps.

    Every rank of a run has one and tells it of every step, since all of them are measured; only the first
    writes and shows.
    """

    def __init__(
        self,
        directory: Path,
        config: ReportConfig,
        *,
        num_steps: int,
        resume_step: int,
        waiting: Mapping[str, float],
        on_metrics: OnMetrics | None = None,
        is_first: bool = True,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Report below `directory`, going on after `resume_step` with what was `waiting` there.

        Args:
            on_metrics: called with every report, after it is written.
            is_first: whether this is the rank that writes and shows.
            stopwatch: what the steps are timed by; None: one of a process alone on a CPU.
        """
        use_tensorboard = wants(config.tensorboard, is_there=has_tensorboard(), what="tensorboard")
        self._use_plot = wants(config.plot, is_there=has_matplotlib(), what="plot")
        self._directory = directory
        self._config = config
        self._num_steps = num_steps
        self._on_metrics = on_metrics
        self._writer = (
            MetricsWriter(directory, resume_step=resume_step, use_tensorboard=use_tensorboard)
            if is_first
            else None
        )
        self._waiting = dict(waiting)
        self._stopwatch = Stopwatch() if stopwatch is None else stopwatch
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console(),
            disable=not (is_first and console().is_terminal),
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=resume_step, figures="")

    def step_done(
        self,
        seen_now: Mapping[str, float],
        *,
        step: int,
        lr: float,
        num_tokens: int,
        total_tokens: int,
        flops: int = 0,
    ) -> None:
        """Count one step; every `log_every` steps, and after the last, their means become a report.

        Every rank calls this. A figure that some steps do not have is the mean over those that have it.

        Args:
            num_tokens: of the step, on all ranks.
            flops: of the step, on all ranks (`training_flops`); 0 where nobody counts them.
        """
        for name, value in seen_now.items():
            for key, more in ((name, value), (_STEPS + name, 1)):
                self._waiting[key] = self._waiting.get(key, 0.0) + more
        self._stopwatch.step_done(num_tokens=num_tokens, flops=flops)
        self._bar.update(self._task, completed=step)
        if step % self._config.log_every and step != self._num_steps:
            return
        means = {
            name: total / self._waiting[_STEPS + name]
            for name, total in self._waiting.items()
            if not name.startswith(_STEPS)
        }
        self._waiting = {}
        report = {"step": step, "tokens": total_tokens, **means, "lr": lr, **self._stopwatch.figures()}
        self.write(report)
        figures = short_line(report)
        self._bar.update(self._task, figures=figures)
        if self._bar.disable:
            self._say(step, figures)

    def waiting(self) -> dict[str, float]:
        """Sums over the steps that no report covers yet, and of how many steps each: for whoever goes on."""
        return dict(self._waiting)

    def evaluated(self, found: Mapping[str, float], *, step: int, total_tokens: int) -> None:
        """Report what the evaluation hook found, and draw the picture anew."""
        self.write({"step": step, "tokens": total_tokens, **found})
        self._say(step, "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items()))
        self.draw()

    def _say(self, step: int, figures: str) -> None:
        if self._writer is not None:
            _LOG.info("step %d/%d  %s", step, self._num_steps, figures)

    def pause(self) -> float:
        """When a break begins that is no training time; give it back to `resume`."""
        return self._stopwatch.pause()

    def resume(self, paused: float) -> None:
        """Take the break since `paused` out of the measured speed."""
        self._stopwatch.resume(paused)

    def aside(self) -> AbstractContextManager[None]:
        """For what exchanges tokens in a break: those are none of the steps'."""
        return self._stopwatch.aside()

    def write(self, report: Mapping[str, float]) -> None:
        """Append one report to metrics.jsonl and the events, and hand it to whoever listens."""
        if self._writer is None:
            return
        self._writer.write(report)
        if self._on_metrics is not None:
            self._on_metrics(report)

    def draw(self) -> None:
        """Draw loss.png from all reports so far."""
        if self._use_plot and self._writer is not None:
            plot_loss(read_metrics(self._directory / METRICS), self._directory / LOSS_PICTURE)

    def __enter__(self) -> Self:
        if self._writer is not None:
            self._writer.__enter__()
        self._bar.start()
        self._stopwatch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)
