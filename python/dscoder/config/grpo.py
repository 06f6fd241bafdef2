"""What `dscoder grpo` does. Defaults are DeepSeekMath's where a paper says something (section 4.2)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.config.reward import RefreshConfig
from dscoder.config.task import TaskConfig
from dscoder.config.train import CheckpointConfig, OptimizerConfig, ReportConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """The objective that moves the policy, and what bounds it.

    Attributes:
        objective: what the terms are averaged over. sequence: whole answers, ratio and KL too (DeepSeek-V2
            eqs 32-34); the others have a term a token. grpo: mean over an answer's tokens, then over answers
            (DeepSeekMath eq. 3); dr_grpo: over answers times the longest they may be; dapo: over all tokens
            of the update; bnpo: over the tokens of each micro-batch, then over micro-batches.
        ratio: of new to old probability, for objectives with a term a token. geometric_mean: that of the
            whole answer, by its length-th root, for each of its tokens.
        ratio_cap: bounds the ratio where clipping does not, for answers worse than their group.
        kl: weight of the k3 estimate of KL(policy, reference).
        correction: weighs terms by trainer's over sampler's probability at the time of sampling, by token or
            by answer. truncate: weights are moved into [correction_floor, correction_cap]; mask: those
            outside count 0.
    """

    objective: Literal["sequence", "grpo", "dr_grpo", "dapo", "bnpo"] = "grpo"
    ratio: Literal["token", "geometric_mean"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    kl: float = 0.04
    correction: Literal["none", "token", "sequence"] = "none"
    correction_rule: Literal["truncate", "mask"] = "truncate"
    correction_cap: float = 3.0
    correction_floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or not (math.isfinite(self.clip_high) and self.clip_high >= 0):
            raise ValueError(
                "PolicyLossConfig: clip_low must be in [0, 1] and clip_high finite and >= 0, "
                f"got {self.clip_low} and {self.clip_high}"
            )
        if self.ratio_cap is not None and not self.ratio_cap > 1 + self.clip_high:
            raise ValueError(
                f"PolicyLossConfig: ratio_cap must be > {1 + self.clip_high}, 1 + clip_high, "
                f"got {self.ratio_cap}"
            )
        if not (math.isfinite(self.kl) and self.kl >= 0):
            raise ValueError(f"PolicyLossConfig: kl must be finite and >= 0, got {self.kl}")
        if not 0 <= self.correction_floor <= 1 <= self.correction_cap:
            raise ValueError(
                "PolicyLossConfig: correction_floor must be in [0, 1] and correction_cap >= 1, "
                f"got {self.correction_floor} and {self.correction_cap}"
            )
        if self.objective == "sequence" and (self.ratio != "token" or self.correction == "token"):
            raise ValueError(
                "PolicyLossConfig: objective sequence has no term a token: ratio must be left alone and "
                f"correction be none or sequence, got {self.ratio} and {self.correction}"
            )


def _check_weights(record: str, functions: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """ValueError unless functions are some, each once, and weights none or one each."""
    if not functions or len(set(functions)) != len(functions):
        raise ValueError(f"{record}: functions must be some, each once, got {functions}")
    if weights and len(weights) != len(functions):
        raise ValueError(
            f"{record}: weights must be as many as functions, {len(functions)}, got {len(weights)}"
        )
    if not all(math.isfinite(weight) and weight != 0 for weight in weights):
        raise ValueError(f"{record}: weights must be finite and not 0, got {weights}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessConfig:
    """Process supervision: each step of an answer is rewarded (DeepSeekMath section 4.1.3)."""

    functions: tuple[str, ...] = ("reward_model",)  # reward_model, or a dotted path
    weights: tuple[float, ...] = ()  # one a function; none: 1 each
    steps: str = "lines"  # lines, statements, sentences, or a regular expression behind which a step ends
    outcome: float = 0.0  # times the answer's own advantage is added; 0: rewards.functions only tell

    def __post_init__(self) -> None:
        _check_weights("ProcessConfig", self.functions, self.weights)
        if not (math.isfinite(self.outcome) and self.outcome >= 0):
            raise ValueError(f"ProcessConfig: outcome must be finite and >= 0, got {self.outcome}")
        if not self.steps:
            raise ValueError("ProcessConfig: steps must be a name or a regular expression, got nothing")

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each function, by name."""
        return dict(zip(self.functions, self.weights or (1.0,) * len(self.functions), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardsConfig:
    """What answers are rewarded for: functions by name, and how much each counts."""

    functions: tuple[str, ...] = ("tests",)  # tests, compiler, format, length, reward_model, or a dotted path
    weights: tuple[float, ...] = ()  # one a function; none: 1 each
    time: float = 120.0  # seconds that a function may take for one group
    # Functions without which a group is left out: where one gives nothing at all. None: tests, if it is used.
    required: tuple[str, ...] | None = None
    format_pattern: str = ""  # format: the regular expression that an answer must match somewhere
    overlong_margin: int = 0  # length: tokens before the longest answer from which on it costs
    process: ProcessConfig | None = None  # given: steps are rewarded too, or instead
    refresh: RefreshConfig | None = None  # given: the reward model learns on at every reset

    def __post_init__(self) -> None:
        _check_weights("RewardsConfig", self.functions, self.weights)
        if not (math.isfinite(self.time) and self.time > 0):
            raise ValueError(f"RewardsConfig: time must be positive, got {self.time}")
        strange = set(self.required or ()).difference(self.functions)
        if strange:
            raise ValueError(
                f"RewardsConfig: required must be some of {', '.join(self.functions)}, functions, "
                f"got {', '.join(sorted(strange))}"
            )
        if self.required and not self.has_outcome:
            raise ValueError(
                "RewardsConfig: required must be empty where process.outcome is 0 (functions only tell), "
                f"got {', '.join(self.required)}"
            )
        if self.overlong_margin < 0:
            raise ValueError(f"RewardsConfig: overlong_margin must be >= 0, got {self.overlong_margin}")
        if ("format" in self.functions) != bool(self.format_pattern):
            raise ValueError(
                "RewardsConfig: function format and format_pattern go together, "
                f"got {', '.join(self.functions)} and {self.format_pattern!r}"
            )

    @property
    def has_outcome(self) -> bool:
        """Whether rewards of whole answers count for what is learnt."""
        return self.process is None or self.process.outcome > 0

    @property
    def has_reward_model(self) -> bool:
        """Whether a reward model rewards answers or steps."""
        of_steps = () if self.process is None else self.process.functions
        return "reward_model" in (*self.functions, *of_steps)

    @property
    def is_required(self) -> dict[str, bool]:
        """Whether a group needs it, by function."""
        by_default = ("tests",) if self.has_outcome else ()
        required = by_default if self.required is None else self.required
        return {name: name in required for name in self.functions}

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each function, by name."""
        return dict(zip(self.functions, self.weights or (1.0,) * len(self.functions), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How answers are sampled and judged."""

    groups: int = 16  # problems a step
    group_size: int = 64  # answers to each
    max_rounds: int = 1  # draws of problems for one step; more: dynamic sampling replaces unusable groups
    max_new_tokens: int = 1024  # of an answer, at most; a task may allow fewer
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    template: Literal["coder", "v2"] | None = None  # the chat template, for tasks that ask in messages
    fim_order: Literal["psm", "spm"] = "psm"  # of tasks with holes, as the model learnt it
    mask_truncated: bool = False  # answers cut off at their longest are not trained on
    engine: Literal["own", "vllm"] = "own"  # what writes the answers; vllm: in this process, by dscoder[vllm]
    # Of the engine. On a GPU its cache stays beside the training, which needs the rest of the memory.
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(memory_share=0.3))
    num_workers: int | None = None  # programs run at one time; None: one a core
    isolation: Literal["full", "rlimits"] = "full"  # of those programs; rlimits is much weaker
    num_scorers: int = 4  # groups whose reward functions run at one time

    def __post_init__(self) -> None:
        for name, value, least in (
            ("groups", self.groups, 1),
            ("group_size", self.group_size, 2),
            ("max_rounds", self.max_rounds, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("num_workers", 1 if self.num_workers is None else self.num_workers, 1),
            ("num_scorers", self.num_scorers, 1),
        ):
            if value < least:
                raise ValueError(f"RolloutConfig: {name} must be >= {least}, got {value}")
        if not self.temperature > 0:
            raise ValueError(
                "RolloutConfig: temperature must be > 0 (answers of a group must differ), "
                f"got {self.temperature}"
            )
        self.sampling(seed=0)

    def sampling(self, *, seed: int) -> SamplingConfig:
        """How one answer is drawn."""
        return SamplingConfig(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfig:
    """How often the policy moves on the answers of one step."""

    passes: int = 1  # over all answers
    minibatches: int = 1  # updates a pass, each from a share of the answers
    micro: int = 8  # answers in one forward and backward pass; gradients add up over an update

    def __post_init__(self) -> None:
        if min(self.passes, self.minibatches, self.micro) < 1:
            raise ValueError(
                "UpdateConfig: passes, minibatches and micro must be >= 1, "
                f"got {self.passes}, {self.minibatches} and {self.micro}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """One run of `dscoder grpo`."""

    model: str  # the policy to begin with, and the reference: a directory, such as RUN/model, or a hub id
    out: str  # the run directory to write
    task: TaskConfig = field(default_factory=lambda: TaskConfig(name="human_eval"))
    num_steps: int = 600
    advantage: Literal["group", "mean", "rloo"] = "group"
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    reward_model: str = ""  # the directory of the reward function reward_model, such as RUN/model
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    reset_every: int = 0  # steps after which the policy becomes the reference (iterative GRPO); 0: never
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="constant", max_lr=1e-6, warmup_steps=0)
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: weights and activations, with float32 masters
    device: str = "auto"  # auto: the GPU if there is one
    seed: int = 0
    num_threads: int | None = None  # None: every core; results are bit-identical only at one number
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=lambda: ReportConfig(log_every=1))
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.reset_every < 0:
            raise ValueError(
                "GrpoConfig: num_steps must be >= 1 and reset_every >= 0, "
                f"got {self.num_steps} and {self.reset_every}"
            )
        if self.reward_model and not self.rewards.has_reward_model:
            raise ValueError(
                "GrpoConfig: reward_model must be among rewards.functions or rewards.process.functions where "
                f"one is named, got {', '.join(self.rewards.functions)} and {self.reward_model!r}"
            )
        if self.rewards.process is not None:
            self._check_process()
        if self.rewards.refresh is not None and not (self.reward_model and self.reset_every):
            raise ValueError(
                "GrpoConfig: rewards.refresh must go with a reward_model and reset_every >= 1, "
                f"got {self.reward_model!r} and {self.reset_every}"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"GrpoConfig: num_threads must be >= 1, got {self.num_threads}")

    def _check_process(self) -> None:
        """ValueError where every token of an answer would count the same."""
        if self.loss.objective == "sequence" or self.loss.ratio != "token":
            raise ValueError(
                "GrpoConfig: rewards.process must go with an objective and a ratio a token (loss.objective "
                "grpo, dr_grpo, dapo or bnpo, loss.ratio token), or what steps differ by is lost, "
                f"got {self.loss.objective} and {self.loss.ratio}"
            )
        if self.advantage == "rloo":
            raise ValueError(
                "GrpoConfig: advantage must be group or mean with rewards.process (a step has no others of "
                f"its kind to leave it out of), got {self.advantage}"
            )
