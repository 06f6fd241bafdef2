"""What a run shows and keeps while it goes: a progress bar, metrics, TensorBoard events, a picture."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dscoder.config.train import ReportConfig
from dscoder.runtime.log import console, get_logger
from dscoder.train.metrics import METRICS, MetricsWriter, has_tensorboard, read_metrics
from dscoder.train.plot import has_matplotlib, plot_loss

LOSS_PICTURE = "loss.png"
_STEPS = "steps of "  # before a figure's name: how many of the steps that wait for a report have it
_SHOWN = ("loss", "accuracy", "reward")  # of a step's figures, in the line that a reader follows
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


class RunReport:
    """Everything a run reports; use as a context manager round the steps."""

    def __init__(
        self,
        directory: Path,
        config: ReportConfig,
        *,
        num_steps: int,
        resume_step: int,
        waiting: Mapping[str, float],
        on_metrics: OnMetrics | None = None,
    ) -> None:
        """Report below `directory`, going on after `resume_step` with what was `waiting` there."""
        use_tensorboard = wants(config.tensorboard, is_there=has_tensorboard(), what="tensorboard")
        self._use_plot = wants(config.plot, is_there=has_matplotlib(), what="plot")
        self._directory = directory
        self._config = config
        self._num_steps = num_steps
        self._on_metrics = on_metrics
        self._writer = MetricsWriter(directory, resume_step=resume_step, use_tensorboard=use_tensorboard)
        self._waiting = dict(waiting)
        self._timed_tokens = 0  # since the last report, in this process: its time is all that is known
        self._since = time.perf_counter()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console(),
            disable=not console().is_terminal,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=resume_step, figures="")

    def step_done(
        self, seen_now: Mapping[str, float], *, step: int, lr: float, num_tokens: int, total_tokens: int
    ) -> None:
        """Count one step; every `log_every` steps, and after the last, their means become a report.

        A figure that some steps do not have is the mean over those that have it.
        """
        for name, value in seen_now.items():
            for key, more in ((name, value), (_STEPS + name, 1)):
                self._waiting[key] = self._waiting.get(key, 0.0) + more
        self._timed_tokens += num_tokens
        self._bar.update(self._task, completed=step)
        if step % self._config.log_every and step != self._num_steps:
            return
        seconds = time.perf_counter() - self._since
        means = {
            name: total / self._waiting[_STEPS + name]
            for name, total in self._waiting.items()
            if not name.startswith(_STEPS)
        }
        speed = self._timed_tokens / seconds
        self.write({"step": step, "tokens": total_tokens, **means, "lr": lr, "tokens_per_second": speed})
        shown = "".join(f"{name} {means[name]:.3f}  " for name in _SHOWN if name in means)
        figures = f"{shown}lr {lr:.2e}  {speed:,.0f} tokens/s"
        self._bar.update(self._task, figures=figures)
        if self._bar.disable:
            _LOG.info("step %d/%d  %s", step, self._num_steps, figures)
        self._waiting, self._timed_tokens = {}, 0
        self._since = time.perf_counter()

    def waiting(self) -> dict[str, float]:
        """Sums over the steps that no report covers yet, and of how many steps each: for whoever goes on."""
        return dict(self._waiting)

    def evaluated(self, found: Mapping[str, float], *, step: int, total_tokens: int) -> None:
        """Report what the evaluation hook found, and draw the picture anew."""
        self.write({"step": step, "tokens": total_tokens, **found})
        figures = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
        _LOG.info("step %d/%d  %s", step, self._num_steps, figures)
        self.draw()

    def pause(self) -> float:
        """When a break begins that is no training time; give it back to `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        """Take the break since `paused` out of the measured speed."""
        self._since += time.perf_counter() - paused

    def write(self, report: Mapping[str, float]) -> None:
        """Append one report to metrics.jsonl and the events, and hand it to whoever listens."""
        self._writer.write(report)
        if self._on_metrics is not None:
            self._on_metrics(report)

    def draw(self) -> None:
        """Draw loss.png from all reports so far."""
        if self._use_plot:
            plot_loss(read_metrics(self._directory / METRICS), self._directory / LOSS_PICTURE)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._writer.__exit__(kind, error, trace)
