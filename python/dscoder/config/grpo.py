"""What `dscoder grpo` does. Defaults are DeepSeekMath's where a paper says something (section 4.2)."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """The objective that moves the policy, and what bounds it.

    Attributes:
        objective: what the terms are averaged over. sequence: whole answers, ratio and KL too (DeepSeek-V2
            eqs 32-34); the others have a term a token. grpo: mean over an answer's tokens, then over answers
            (DeepSeekMath eq. 3); dr_grpo: over answers times the longest they may be; dapo: over all tokens
            of the step; bnpo: over the tokens of each micro-batch, then over micro-batches.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardsConfig:
    """What answers are rewarded for: functions by name, and how much each counts."""

    functions: tuple[str, ...] = ("tests",)  # tests, compiler, format, length, or a dotted path to a callable
    weights: tuple[float, ...] = ()  # one a function; none: 1 each
    time: float = 120.0  # seconds that a function may take for one group
    format_pattern: str = ""  # format: the regular expression that an answer must match somewhere
    overlong_margin: int = 0  # length: tokens before the longest answer from which on it costs

    def __post_init__(self) -> None:
        if not self.functions or len(set(self.functions)) != len(self.functions):
            raise ValueError(f"RewardsConfig: functions must be some, each once, got {self.functions}")
        if self.weights and len(self.weights) != len(self.functions):
            raise ValueError(
                f"RewardsConfig: weights must be as many as functions, {len(self.functions)}, "
                f"got {len(self.weights)}"
            )
        if not all(math.isfinite(weight) and weight != 0 for weight in self.weights):
            raise ValueError(f"RewardsConfig: weights must be finite and not 0, got {self.weights}")
        if not (math.isfinite(self.time) and self.time > 0):
            raise ValueError(f"RewardsConfig: time must be positive, got {self.time}")
        if self.overlong_margin < 0:
            raise ValueError(f"RewardsConfig: overlong_margin must be >= 0, got {self.overlong_margin}")
        if ("format" in self.functions) != bool(self.format_pattern):
            raise ValueError(
                "RewardsConfig: function format and format_pattern go together, "
                f"got {', '.join(self.functions)} and {self.format_pattern!r}"
            )

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each function, by name."""
        return dict(zip(self.functions, self.weights or (1.0,) * len(self.functions), strict=True))
