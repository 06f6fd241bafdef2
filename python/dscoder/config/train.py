"""What `dscoder pretrain` does. Defaults are the papers' where they say something (DeepSeek-V2, 3.1)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dscoder.config.model import ModelConfig, YarnConfig
from dscoder.config.parallel import ParallelConfig, check_experts_divide


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over a run: linear warm-up, then a shape over the share of tokens seen."""

    kind: Literal["multi_step", "cosine", "constant"] = "multi_step"
    max_lr: float = 4.2e-4
    warmup_steps: int = 2000
    milestones: tuple[float, ...] = (0.8, 0.9)  # multi_step: shares of the tokens after which lr is cut
    factor: float = 0.316  # multi_step: what each cut multiplies by
    final_share: float = 0.1  # cosine: of max_lr, at the end

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_lr) and self.max_lr > 0):
            raise ValueError(f"ScheduleConfig: max_lr must be positive, got {self.max_lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"ScheduleConfig: warmup_steps must be >= 0, got {self.warmup_steps}")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"ScheduleConfig: milestones must rise inside (0, 1), got {self.milestones}")
        for name, value in (("factor", self.factor), ("final_share", self.final_share)):
            if not 0 < value <= 1:
                raise ValueError(f"ScheduleConfig: {name} must be in (0, 1], got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Sequences per optimizer step, and how many go through the model at once."""

    sequences: int = 32
    ramp_from: int | None = None  # sequences of the first step; None: no ramp
    ramp_tokens: int = 0  # tokens over which the batch grows linearly from ramp_from to sequences
    micro: int = 8  # sequences in one forward and backward pass; gradients add up over a step

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.micro < 1:
            raise ValueError(
                f"BatchConfig: sequences and micro must be >= 1, got {self.sequences} and {self.micro}"
            )
        if (self.ramp_from is None) != (self.ramp_tokens == 0):
            raise ValueError(
                "BatchConfig: ramp_from and ramp_tokens go together, "
                f"got {self.ramp_from} and {self.ramp_tokens}"
            )
        if self.ramp_from is not None and not 1 <= self.ramp_from <= self.sequences:
            raise ValueError(
                f"BatchConfig: ramp_from must be in [1, sequences = {self.sequences}], got {self.ramp_from}"
            )
        if self.ramp_tokens < 0:
            raise ValueError(f"BatchConfig: ramp_tokens must be >= 0, got {self.ramp_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW. Decay is for matrices (two or more dimensions); the papers do not say which parameters."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8  # no paper states it: the default of torch, and of AdamW's authors
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # largest global gradient norm

    def __post_init__(self) -> None:
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"OptimizerConfig: {name} must be in [0, 1), got {value}")
        if not self.eps > 0 or not self.clip_norm > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"OptimizerConfig: eps and clip_norm must be positive and weight_decay >= 0, "
                f"got {self.eps}, {self.clip_norm} and {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LongContextConfig:
    """How stage long_context stretches positions: YaRN for latent attention, linear for grouped queries."""

    # Its original_max_positions is replaced by what the model was trained at (DeepSeek-V2 section 3.1.4).
    yarn: YarnConfig = field(default_factory=YarnConfig)
    linear_factor: float = 4.0  # v1 (DeepSeek-Coder section 3.6)
    theta: float = 100000.0  # v1's new base frequency


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """How often the state of a run is saved; a killed run goes on from the latest save."""

    every: int = 200  # steps
    keep: int = 2  # older ones are deleted
    bitwise: bool = True  # going on has the bits of not stopping; False: a GPU takes its fastest kernels

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"CheckpointConfig: every and keep must be >= 1, got {self.every} and {self.keep}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a run tells while it goes. `auto` leaves out what is not installed, `on` makes that an error."""

    log_every: int = 10  # steps between two lines of metrics
    eval_every: int = 200  # steps between two evaluations; there is always one at the end
    eval_windows: int = 128  # of the held-out set, the first so many
    tensorboard: Literal["auto", "on", "off"] = "auto"
    plot: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, value in (
            ("log_every", self.log_every),
            ("eval_every", self.eval_every),
            ("eval_windows", self.eval_windows),
        ):
            if value < 1:
                raise ValueError(f"ReportConfig: {name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Which steps are profiled, as reports number them: from 1."""

    start: int | None = None  # the first one; None: the third of this start of the run
    steps: int = 3  # how many in a row; a trace holds every operator of each

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"ProfileConfig: {name} must be >= 1, got {value}")

    def check(self, num_steps: int) -> None:
        """ValueError unless a run of `num_steps` has all these steps."""
        last = (self.start or 1) + self.steps - 1
        if last > num_steps:
            raise ValueError(
                f"ProfileConfig: the last step to profile must be <= num_steps = {num_steps}, got {last}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One run of `dscoder pretrain`."""

    data: str  # a directory of `dscoder prepare`
    out: str  # the run directory to write
    model: ModelConfig | None = None  # a fresh model; None: the one of init_from
    init_from: str | None = None  # a model directory or hub id to go on from, with a fresh optimizer
    stage: Literal["pretrain", "long_context"] = "pretrain"
    long_context: LongContextConfig = field(default_factory=LongContextConfig)
    window: int | None = None  # what the windows of the data must have, in tokens; None: any length
    num_steps: int = 1000
    batch: BatchConfig = field(default_factory=BatchConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16", "bf16_stochastic"] = "fp32"  # bf16: with float32 masters, or without
    device: str = "auto"  # auto: the GPU if there is one
    seed: int = 0
    num_threads: int | None = None  # None: every core; results are bit-identical only at one number
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig | None = None  # None: nothing is profiled
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (self.init_from is None):
            raise ValueError(
                "PretrainConfig: exactly one of model and init_from must be given, got "
                + ("neither" if self.model is None else "both")
            )
        if self.stage == "long_context" and self.init_from is None:
            raise ValueError(
                "PretrainConfig: stage long_context needs init_from, the model to extend, got none"
            )
        if self.window is not None and self.window < 2:
            raise ValueError(f"PretrainConfig: window must be >= 2, got {self.window}")
        if self.num_steps < 1:
            raise ValueError(f"PretrainConfig: num_steps must be >= 1, got {self.num_steps}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"PretrainConfig: num_threads must be >= 1, got {self.num_threads}")
        if self.profile is not None:
            self.profile.check(self.num_steps)
        if self.model is not None:
            check_experts_divide(self.model, self.parallel)
