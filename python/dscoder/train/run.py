"""The run that every training stage is: steps, reports, checkpoints, a stop on signals, and resuming.

A stage gives a `Job`: the model, and what one step does. A step is a function of the weights, the optimizer's
moments, torch's generators and the step number. So a run that goes on from a checkpoint does what the run
that was never stopped does, bit for bit, on the same number of threads; on a GPU with `checkpoint.bitwise`.

Many ranks do the same run together: rank 0 holds the stage's directory and writes what is written once, all
take each step, evaluate, save and export. They stop after the same step, whoever of them was told to.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from dscoder.config.train import CheckpointConfig, OptimizerConfig, ProfileConfig, ReportConfig
from dscoder.runtime.artifact import Stage, hash_path, open_stage, write_bytes
from dscoder.runtime.log import get_logger
from dscoder.runtime.mesh import hold_termination
from dscoder.runtime.seed import (
    allow_fastest_kernels,
    available_threads,
    deterministic,
    random_state,
    restore_random_state,
)
from dscoder.train.checkpointing import CheckpointWriter, Progress, completed, load_state, read_progress
from dscoder.train.metrics import METRICS, read_metrics
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.profiling import StepProfiler
from dscoder.train.ranks import STOPS, Note, Ranks
from dscoder.train.report import OnMetrics, RunReport
from dscoder.train.stopwatch import Stopwatch

MODEL = "model"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
_RANDOM = "random."  # begins the names of the generators' states in a checkpoint
# What may differ from one start of a run to the next: places (inputs go by what they hold), and reports.
_FREE = ("out", "num_threads", "checkpoint", "report", "overwrite")
_LOG = get_logger(__name__)


class RunConfig(Protocol):
    """The fields that the config of every training stage has; a frozen dataclass."""

    @property
    def out(self) -> str:
        """The run directory to write."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Of AdamW."""

    @property
    def seed(self) -> int:
        """Of every random choice."""

    @property
    def num_threads(self) -> int | None:
        """Of torch; None: every core."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """How often the state is saved."""

    @property
    def report(self) -> ReportConfig:
        """What the run tells."""

    @property
    def overwrite(self) -> bool:
        """Whether another run in `out` is deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """What one step saw; the reports average `figures` over their steps."""

    figures: Mapping[str, float]
    num_sequences: int
    num_tokens: int
    flops: int = 0  # see `training_flops`; 0 where nobody counts them


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a stage gives to its run. Every callable works on the live `model`."""

    model: nn.Module  # in training mode; its parameters that require a gradient are trained
    num_steps: int  # of the whole run
    learning_rate: Callable[[int], float]  # of a step, from 0
    train_step: Callable[[MasterAdamW, int, float], StepDone]  # moves the weights: optimizer, step, its rate
    export: Callable[[Path], None]  # writes `results` below the stage's directory, after the last step
    results: Sequence[str] = (MODEL,)  # folders and files there that the stage's result is
    evaluate: Callable[[], Mapping[str, float]] | None = None  # every report.eval_every steps and at the end
    begin: Callable[[int], None] | None = None  # before the first step: the steps done, 0 or a checkpoint's
    extra_state: Mapping[str, Tensor] = field(default_factory=dict)  # more live tensors for the checkpoints
    rounding_seed: int | None = None  # see MasterAdamW
    stopwatch: Stopwatch | None = None  # None: one that knows of no FLOPs and no exchange


class StoppedError(RuntimeError):
    """A signal ended the run after a checkpoint; starting it again goes on from there."""

    def __init__(self, signal_number: int, *, step: int, directory: Path) -> None:
        """Say what happened and what to do."""
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}; a checkpoint is in {directory}, "
            "and the same command goes on from there"
        )
        self.signal_number = signal_number


@contextmanager
def _stop_on_signals(ranks: Ranks) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one acts as it always does.

    After an error of many ranks SIGTERM waits until the mesh has explained it.
    """
    ranks.forget()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        ranks.tell(STOPS[signal.Signals(number)])
        signal.signal(number, previous[number])
        _LOG.warning("%s: stopping after this step and a checkpoint", signal.Signals(number).name)

    previous: dict[int, Any] = {number: signal.signal(number, ask) for number in STOPS}
    is_explained_later = False
    try:
        yield
    except Exception as error:
        is_explained_later = ranks.mesh is not None and not isinstance(error, StoppedError)
        raise
    finally:
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        if is_explained_later:
            hold_termination()
        else:
            signal.signal(signal.SIGTERM, previous[signal.SIGTERM])


def _stop_asked(ranks: Ranks) -> int | None:
    """The signal that asked any rank for a stop, as all of them know it."""
    return next((int(number) for number, note in STOPS.items() if ranks.heard(note)), None)


def hash_model(path_or_repo_id: str) -> str:
    """What a model directory holds, as the input of a stage; a model of the hub goes by its id."""
    path = Path(path_or_repo_id).expanduser()
    return hash_path(path) if path.exists() else path_or_repo_id


class _Run:
    """A run under way: the job, its optimizer, and how far it is."""

    def __init__(self, job: Job, config: RunConfig, directory: Path, ranks: Ranks) -> None:
        self.job = job
        self.config = config
        self.directory = directory
        self.ranks = ranks
        self.optimizer = MasterAdamW(
            job.model, config.optimizer, mesh=ranks.mesh, rounding_seed=job.rounding_seed
        )
        # Of the steps done, and of the report that the last checkpoint fell into.
        self.progress = Progress(
            step=0,
            num_sequences=0,
            num_tokens=0,
            num_threads=torch.get_num_threads(),
            layout=ranks.layout(),
        )

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        random = {f"{_RANDOM}{name}": tensor for name, tensor in random_state(self._device).items()}
        extra = {f"extra.{name}": tensor for name, tensor in self.job.extra_state.items()}
        return self.optimizer.state() | random | extra

    @property
    def _device(self) -> torch.device | None:
        """The one whose generator is this rank's; None: all that there are."""
        return None if self.ranks.mesh is None else self.ranks.mesh.device

    def restore(self, latest: tuple[Path, Progress] | None) -> None:
        """Go on from the checkpoint `latest`, if there is one."""
        if latest is None:
            return
        path, saved = latest
        state = self.state()
        # Whoever saved it may have seen fewer GPUs.
        load_state(path, state, self.ranks, optional=_RANDOM)
        self.optimizer.refresh_parameters()
        random = {name.removeprefix(_RANDOM): t for name, t in state.items() if name.startswith(_RANDOM)}
        restore_random_state(random, self._device)
        self.progress = replace(saved, num_threads=torch.get_num_threads(), layout=self.ranks.layout())
        _LOG.info("going on from %s", path)

    def take_step(self, report: RunReport) -> None:
        """One step and what it adds to the report."""
        before = self.progress
        lr = self.job.learning_rate(before.step)
        done = self.job.train_step(self.optimizer, before.step, lr)
        self.progress = replace(
            before,
            step=before.step + 1,
            num_sequences=before.num_sequences + done.num_sequences,
            num_tokens=before.num_tokens + done.num_tokens,
        )
        report.step_done(
            done.figures,
            step=self.progress.step,
            lr=lr,
            num_tokens=done.num_tokens,
            total_tokens=self.progress.num_tokens,
            flops=done.flops,
        )


def _train(run: _Run, writer: CheckpointWriter, report: RunReport, profiler: StepProfiler) -> None:
    """All steps that are left."""
    config, evaluate, ranks = run.config, run.job.evaluate, run.ranks
    while run.progress.step < run.job.num_steps:
        with profiler.step(run.progress.step + 1):
            run.take_step(report)
            paused = report.pause()  # before a profile is written
        if writer.has_failed():
            ranks.tell(Note.UNSAVED)
        if ranks.heard(Note.UNSAVED):
            writer.wait()
        step = run.progress.step
        is_last = step == run.job.num_steps
        if evaluate is not None and (is_last or step % config.report.eval_every == 0):
            with report.aside():
                found = evaluate()
            report.evaluated(found, step=step, total_tokens=run.progress.num_tokens)
        asked = _stop_asked(ranks)  # read once: a signal after the save below waits for the next step
        if is_last or asked is not None or step % config.checkpoint.every == 0:
            writer.save(replace(run.progress, waiting=report.waiting()), run.state())
        report.resume(paused)
        if asked is not None and not is_last:
            writer.wait()
            raise StoppedError(asked, step=step, directory=writer.directory)


def _latest(directory: Path) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint of a run and how far it is."""
    found = completed(directory / CHECKPOINTS)
    return (found[-1][1], read_progress(found[-1][1])) if found else None


def _num_threads(config: RunConfig, saved: Progress | None, ranks: Ranks, *, command: str) -> int:
    """What the run had when it was `saved` by the same layout, else what the config says, else all cores."""
    if saved is None or saved.layout != ranks.layout():
        return config.num_threads or min(ranks.gather(available_threads(ranks.num_neighbours())))
    if config.num_threads not in (None, saved.num_threads):
        raise ValueError(
            f"{command}: num_threads must be {saved.num_threads}, what the run in {config.out} began with, "
            f"got {config.num_threads}"
        )
    return saved.num_threads


def _finish(run: _Run, stage: Stage, report: RunReport) -> None:
    """Write what the stage leaves, then the manifest."""
    report.draw()
    run.job.export(stage.directory)
    progress = run.progress

    def seal() -> None:
        last: dict[str, float] = {}
        for line in read_metrics(stage.directory / METRICS):
            last |= line
        stage.finish(
            counts={
                "steps": progress.step,
                "sequences": progress.num_sequences,
                "tokens": progress.num_tokens,
            },
            facts={"num_threads": progress.num_threads, "layout": progress.layout, "final": last},
            results=run.job.results,
        )

    run.ranks.first(seal)


def run_stage(
    config: RunConfig,
    build: Callable[[Path], Job],
    *,
    command: str,
    inputs: Mapping[str, str],
    free: Sequence[str] = (),
    on_metrics: OnMetrics | None = None,
    profile: ProfileConfig | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Do, or go on with, the training stage in `config.out`; returns that directory.

    Args:
        build: makes the job, seeded, for a stage directory that is not finished; it refuses what does not go
            together before anything is written.
        inputs: hash of each input, by role; those of rank 0 count.
        free: fields of the config that may differ from one start to the next, besides those of every run.
        on_metrics: called with every report, after it is written, on rank 0.
        profile: steps to profile.
        ranks: all ranks call this function with the same arguments. None: this process is alone.

    Raises:
        StoppedError: SIGINT or SIGTERM; a checkpoint was written.
        LossError: a figure of a step is not a number.
        ValueError: config and inputs do not go together, or `config.out` holds another run.
        OSError: a checkpoint could not be written.
        RankError: another rank raised one of these.
    """
    ranks = ranks or Ranks()
    with ExitStack() as held:

        def enter() -> Stage:
            return held.enter_context(
                open_stage(
                    Path(config.out),
                    command=command,
                    config=asdict(config),  # type: ignore[call-overload]
                    inputs=inputs,
                    free=(*free, *_FREE),
                    overwrite=config.overwrite,
                    is_resumable=True,
                )
            )

        stage = ranks.first(enter)
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        latest = ranks.first(lambda: _latest(stage.directory))
        saved = None if latest is None else latest[1]
        num_threads = _num_threads(config, saved, ranks, command=command)
        with deterministic(seed=config.seed, num_threads=num_threads):
            job = build(stage.directory)
            run = _Run(job, config, stage.directory, ranks)
            run.restore(latest)
            _run_job(run, stage, on_metrics, profile)
        return stage.directory


def _run_job(run: _Run, stage: Stage, on_metrics: OnMetrics | None, profile: ProfileConfig | None) -> None:
    config, job, ranks = run.config, run.job, run.ranks
    device = next(job.model.parameters()).device
    if not config.checkpoint.bitwise:
        allow_fastest_kernels(device)
    # Without overwrite: this file is there to go on with the run, not to begin it again.
    fields: dict[str, Any] = asdict(config)  # type: ignore[call-overload]
    resolved = {key: value for key, value in fields.items() if key != "overwrite"}
    content = yaml.safe_dump(resolved, sort_keys=False).encode()
    ranks.first(lambda: write_bytes(stage.directory / CONFIG, content))
    if job.begin is not None:
        job.begin(run.progress.step)
    with (
        CheckpointWriter(stage.directory / CHECKPOINTS, keep=config.checkpoint.keep, ranks=ranks) as writer,
        RunReport(
            stage.directory,
            config.report,
            num_steps=job.num_steps,
            resume_step=run.progress.step,
            waiting=run.progress.waiting,
            on_metrics=on_metrics,
            is_first=ranks.is_first,
            stopwatch=job.stopwatch or Stopwatch(device, ranks=ranks),
        ) as report,
        StepProfiler(
            stage.directory,
            profile,
            num_steps=job.num_steps,
            resume_step=run.progress.step,
            device=device,
            rank=ranks.rank,
            world_size=ranks.size,
        ) as profiler,
        _stop_on_signals(ranks),
    ):
        _train(run, writer, report, profiler)
        writer.wait()
        _finish(run, stage, report)
