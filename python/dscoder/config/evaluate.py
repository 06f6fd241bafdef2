"""What measuring a model takes: on held-out files, and on the problems of a task."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dscoder.config.data import SourcesConfig
from dscoder.config.generate import BatchConfig
from dscoder.config.task import TaskConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutConfig:
    """Bits per byte and single-line infilling on the files that training never saw."""

    out: str  # the directory to write
    model: str  # a model directory
    data: str  # what `dscoder prepare` wrote: the held-out windows
    sources: SourcesConfig = field(default_factory=SourcesConfig)  # as prepare read them
    untrained_seed: int | None = None  # measure these initial weights of the same model too
    num_windows: int | None = None  # for bits per byte; None: all
    num_holes: int = 300
    max_per_document: int = 12  # holes of one file
    hole_seed: int = 0
    max_new_tokens: int = 48
    fim_order: str = "psm"  # of a hole's prompt: psm or spm, as the model learnt it
    prefix_share: float = 0.75  # of the context, where the text around a hole is too long
    max_batch: int = 32
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = {
            "num_holes": self.num_holes,
            "max_per_document": self.max_per_document,
            "max_new_tokens": self.max_new_tokens,
            "max_batch": self.max_batch,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"HeldOutConfig: {name} must be >= 1, got {value}")
        if self.num_windows is not None and self.num_windows < 1:
            raise ValueError(f"HeldOutConfig: num_windows must be >= 1, got {self.num_windows}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScoreConfig:
    """The share of answers to a task's problems that pass."""

    out: str  # the directory to write
    model: str  # a model directory or hub id
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="human_eval"))
    num_samples: int = 8  # answers drawn to each problem, besides a greedy one
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024  # of an answer, at most; a task may allow fewer
    template: Literal["coder", "v2"] | None = None  # the chat template, for tasks that ask in messages
    fim_order: Literal["psm", "spm"] = "psm"  # of tasks with holes, as the model learnt it
    batch: BatchConfig = field(default_factory=BatchConfig)
    dtype: str = "auto"  # auto: as stored
    device: str = "auto"  # auto: the GPU if there is one
    num_threads: int | None = None  # of torch; None: every core
    num_workers: int | None = None  # programs run at one time; None: one a core
    isolation: Literal["full", "rlimits"] = "full"  # of those programs; rlimits is much weaker
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value in (("num_samples", self.num_samples), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise ValueError(f"TaskScoreConfig: {name} must be >= 1, got {value}")
        for name, count in (("num_threads", self.num_threads), ("num_workers", self.num_workers)):
            if count is not None and count < 1:
                raise ValueError(f"TaskScoreConfig: {name} must be >= 1, got {count}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"TaskScoreConfig: temperature must be positive, got {self.temperature}")
