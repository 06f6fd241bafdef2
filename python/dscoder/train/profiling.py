"""A torch profiler trace and a picture of the memory for a few steps of a run, below RUN/profile.

A step is watched from outside: nothing that it computes depends on being watched. Every rank writes files of
its own; what an earlier start of the run left is never overwritten.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from dscoder.config.train import ProfileConfig
from dscoder.runtime.log import get_logger

PROFILES = "profile"
TRACE = "trace.json.gz"  # for https://ui.perfetto.dev and chrome://tracing
OPERATORS = "operators.txt"
MEMORY_SNAPSHOT = "memory.pickle"  # of a GPU, for https://docs.pytorch.org/memory_viz
MEMORY_TABLE = "memory.txt"  # of a CPU, whose allocations torch keeps no history of
_UNWATCHED = 2  # first steps of a process: they compile, tune, and fill the allocator's caches
_WARMUP = 1  # steps that the profiler sees and forgets: its own start is slow
_MAX_EVENTS = 100_000  # of the allocator, the latest; while they are read no other thread goes on, nor beats
_MAX_ROWS = 60
_ABOUT_CPU_MEMORY = """\
Bytes that torch's operators allocated on the CPU less what they freed, over the profiled steps. The course of
the memory is in the trace, as its [memory] events. torch takes snapshots of the memory of GPUs only.
"""
_LOG = get_logger(__name__)


def profiled_steps(config: ProfileConfig, *, num_steps: int, resume_step: int) -> range:
    """The steps to profile in a process that goes on after `resume_step`; steps count from 1, as in reports.

    Without a given start the first steps of the process are left out, as far as enough others are left.
    """
    if config.start is None:
        latest = max(num_steps - config.steps, resume_step)
        begin = min(resume_step + _UNWATCHED, latest) + 1
    else:
        begin = max(config.start, resume_step + 1)
    last = min((begin if config.start is None else config.start) + config.steps - 1, num_steps)
    return range(begin, last + 1)


class StepProfiler:
    """Profiles the steps that were asked for; use as a context manager round all of a run's steps."""

    def __init__(
        self,
        directory: Path,
        config: ProfileConfig | None,
        *,
        num_steps: int,
        resume_step: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Profile below the run's `directory`; a `config` of None asks for nothing."""
        self._directory = directory / PROFILES
        self._device = device
        self._file_start = f"rank-{rank}-of-{world_size}"
        self._steps = range(0)
        self._seen: list[int] = []  # profiled steps that have begun
        self._profiler: profile | None = None
        self._num_warmup = 0
        if config is None:
            return
        self._steps = profiled_steps(config, num_steps=num_steps, resume_step=resume_step)
        if not self._steps:
            _LOG.warning("no steps are left to profile: the run goes on after step %d", resume_step)
            return
        self._num_warmup = min(_WARMUP, self._steps.start - 1 - resume_step)
        path = self._path(TRACE, self._steps)
        if path.exists():
            _LOG.warning("nothing is profiled: %s is there from an earlier start; delete it to repeat", path)
            self._steps = range(0)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Stands round step `number`, from 1."""
        if self._steps and number == self._steps.start - self._num_warmup:
            self._begin()
        if self._profiler is None:
            yield
            return
        if number in self._steps:
            if not self._seen and self._device.type == "cuda":
                # Frames of C++ would be looked up one by one when the history is read.
                torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS, stacks="python")
            self._seen.append(number)
        with record_function(f"step {number}"):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # so that its kernels are not another step's
        self._profiler.step()
        if number == self._steps[-1]:
            self._end()

    def _begin(self) -> None:
        is_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        last = self._num_warmup + len(self._steps) - 1

        def action(index: int) -> ProfilerAction:
            if index < self._num_warmup:
                return ProfilerAction.WARMUP
            if index > last:
                return ProfilerAction.NONE
            return ProfilerAction.RECORD_AND_SAVE if index == last else ProfilerAction.RECORD

        self._profiler = profile(
            activities=activities,
            schedule=action,
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def _end(self) -> None:
        """Stop watching; steps that were cut short by a stop of the run are written as far as they went."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)

    def _path(self, name: str, steps: range) -> Path:
        folder = f"steps-{steps[0]:09d}-{steps[-1]:09d}"
        return self._directory / folder / f"{self._file_start}.{name}"

    def _write(self, profiler: profile) -> None:
        if not self._seen:
            return  # stopped after the warm-up
        steps = range(self._seen[0], self._seen[-1] + 1)
        path = self._path(TRACE, steps)
        if path.exists():
            _LOG.warning(
                "the profile of steps %d to %d is not written: %s is there", *(steps[0], steps[-1], path)
            )
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write_tables(profiler, steps)
            # Last, and under its name only when whole: with it a profile counts as made.
            partial = path.with_name(f"partial-{path.name}")
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # the latter of torch's own writer
            _LOG.error("the profile of steps %d to %d is lost: %s", steps[0], steps[-1], error)
            return
        _LOG.info("steps %d to %d are profiled in %s", steps[0], steps[-1], path.parent)

    def _write_tables(self, profiler: profile, steps: range) -> None:
        is_gpu = self._device.type == "cuda"
        sums = profiler.key_averages()
        by_time = sums.table(sort_by=f"self_{self._device.type}_time_total", row_limit=_MAX_ROWS)
        self._path(OPERATORS, steps).write_text(f"{by_time}\n")
        if is_gpu:
            with self._path(MEMORY_SNAPSHOT, steps).open("wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(self._device), file)
            return
        by_memory = sums.table(sort_by="self_cpu_memory_usage", row_limit=_MAX_ROWS)
        self._path(MEMORY_TABLE, steps).write_text(f"{_ABOUT_CPU_MEMORY}\n{by_memory}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
