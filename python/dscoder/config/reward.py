"""What `dscoder prefer` and `dscoder reward-model` do."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dscoder.config import generate
from dscoder.config.task import TaskConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, OptimizerConfig, ReportConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """Which two answers to one prompt make a pair."""

    max_pairs: int = 8  # of one prompt, so that no prompt outweighs the others
    min_gap: float = 0.01  # smallest difference of pass rates
    by_outcome: bool = False  # of equal pass rates: no program < does not compile < compiles, too

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise ValueError(f"PairsConfig: max_pairs must be >= 1, got {self.max_pairs}")
        if not 0 < self.min_gap <= 1:
            raise ValueError(f"PairsConfig: min_gap must be in (0, 1], got {self.min_gap}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferConfig:
    """One run of `dscoder prefer`."""

    out: str  # the directory to write
    model: str | None = None  # a model directory or hub id to sample candidates from
    candidates: tuple[str, ...] = ()  # or JSONL files with candidates, or directories of them
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="human_eval"))
    max_problems: int | None = None  # the first so many; None: all
    num_candidates: int = 16  # sampled a prompt
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int | None = None  # None: what the task says
    template: Literal["coder", "v2"] | None = None  # the chat template, for tasks that ask in messages
    fim_order: Literal["psm", "spm"] = "psm"  # of tasks with holes, as the model learnt it
    batch: generate.BatchConfig = field(default_factory=generate.BatchConfig)
    dtype: str = "auto"  # auto: as stored
    device: str = "auto"  # auto: the GPU if there is one
    pairs: PairsConfig = field(default_factory=PairsConfig)
    isolation: Literal["full", "rlimits"] = "full"  # of the sandbox; rlimits alone keeps nothing secret
    num_workers: int | None = None  # programs run at one time; None: one a core
    num_threads: int | None = None  # of torch; None: every core
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.candidates):
            raise ValueError(
                "PreferConfig: exactly one of model and candidates must be given, got "
                + ("neither" if self.model is None else "both")
            )
        if self.num_candidates < 2:
            raise ValueError(f"PreferConfig: num_candidates must be >= 2, got {self.num_candidates}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"PreferConfig: temperature must be positive, or all candidates of a prompt are the same, "
                f"got {self.temperature}"
            )
        for name, value in (
            ("max_problems", self.max_problems),
            ("max_new_tokens", self.max_new_tokens),
            ("num_threads", self.num_threads),
        ):
            if value is not None and value < 1:
                raise ValueError(f"PreferConfig: {name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardLossConfig:
    """What the scalar head learns."""

    kind: Literal["pairwise", "pointwise"] = "pairwise"  # order of two answers, or the pass rate of each
    margin: float = 1.0  # pairwise: times the difference of pass rates; 0: none
    centring: float = 0.0  # pairwise: weight of the squared sum of a pair's scores, which keeps them near 0

    def __post_init__(self) -> None:
        for name, value in (("margin", self.margin), ("centring", self.centring)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"RewardLossConfig: {name} must be finite and >= 0, got {value}")
            if self.kind == "pointwise" and name == "centring" and value:
                raise ValueError(f"RewardLossConfig: {name} must be 0 for a pointwise loss, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig:
    """How prompts and answers become tokens."""

    template: Literal["coder", "v2"] | None = None  # the chat template, for prompts that are messages
    fim_order: Literal["psm", "spm"] = "psm"  # of prompts with a hole
    max_length: int | None = None  # tokens of prompt and answer; longer ones are dropped; None: the model's

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"ReadingConfig: max_length must be >= 1, got {self.max_length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayConfig:
    """Earlier preferences among new ones, where a reward model follows a policy (DeepSeekMath, 4.1.4)."""

    preferences: tuple[str, ...] = ()  # directories of `dscoder prefer` that were learnt from before
    share: float = 0.1  # of what is learnt from, the rest is new

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"ReplayConfig: share must be in (0, 1), got {self.share}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelConfig:
    """One run of `dscoder reward-model`. The learning rate is DeepSeekMath's (section 4.2)."""

    preferences: tuple[str, ...]  # directories of `dscoder prefer`
    init_from: str  # a model directory with its tokenizer: of `dscoder sft`, or an earlier reward model
    out: str  # the run directory to write
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    held_out_share: float = 0.1  # of the prompts, chosen by a hash of each
    epochs: float = 1.0  # over the pairs, or the answers, where num_steps is not given
    num_steps: int | None = None  # of the optimizer
    batch: BatchConfig = field(
        default_factory=lambda: BatchConfig(sequences=64, micro=8)
    )  # pairs, or answers
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="cosine", max_lr=2e-5, warmup_steps=20)
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: weights and activations, with float32 masters
    device: str = "auto"  # auto: the GPU if there is one
    seed: int = 0
    num_threads: int | None = None  # None: every core; results are bit-identical only at one number
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.preferences:
            raise ValueError("RewardModelConfig: preferences must name at least one directory, got none")
        if not 0 < self.held_out_share < 1:
            raise ValueError(
                f"RewardModelConfig: held_out_share must be in (0, 1), got {self.held_out_share}"
            )
        if not self.epochs > 0:
            raise ValueError(f"RewardModelConfig: epochs must be positive, got {self.epochs}")
        for name, value in (("num_steps", self.num_steps), ("num_threads", self.num_threads)):
            if value is not None and value < 1:
                raise ValueError(f"RewardModelConfig: {name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshConfig:
    """How the reward model of a GRPO run learns on from what the policy wrote (DeepSeekMath, 4.1.4)."""

    preferences: tuple[str, ...] = ()  # directories of `dscoder prefer` that it learnt from before
    replay_share: float = 0.1  # earlier preferences among what is learnt from: those, and those of resets
    pairs: PairsConfig = field(default_factory=PairsConfig)
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
    held_out_share: float = 0.1  # of the prompts: never learnt from, for the accuracy before and after
    epochs: float = 1.0  # over the pairs, or the answers, where num_steps is not given
    num_steps: int | None = None  # of the optimizer, at each reset
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(sequences=64, micro=8))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="constant", max_lr=2e-5, warmup_steps=0)
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_length: int | None = None  # tokens of prompt and answer; longer ones are dropped; None: the model's
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        ReplayConfig(share=self.replay_share)
        ReadingConfig(max_length=self.max_length)
        self.run_config(init_from="", preferences=("",), replay=(), out="")

    def run_config(
        self, *, init_from: str, preferences: tuple[str, ...], replay: tuple[str, ...], out: str
    ) -> RewardModelConfig:
        """The run of `dscoder reward-model` that one reset is."""
        return RewardModelConfig(
            preferences=preferences,
            init_from=init_from,
            out=out,
            loss=self.loss,
            reading=ReadingConfig(max_length=self.max_length),
            replay=ReplayConfig(preferences=replay, share=self.replay_share),
            held_out_share=self.held_out_share,
            epochs=self.epochs,
            num_steps=self.num_steps,
            batch=self.batch,
            schedule=self.schedule,
            optimizer=self.optimizer,
            checkpoint=self.checkpoint,
            report=ReportConfig(eval_every=1 << 30, tensorboard="off", plot="off"),
        )
