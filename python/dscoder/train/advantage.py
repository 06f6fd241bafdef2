"""Advantages within a group: how much better an answer is than the others to the same prompt.

Outcome supervision gives every token of an answer the same number (DeepSeek-V2 eq. 33, DeepSeekMath section
4.1.2), process supervision the sum of the normalised rewards of the steps that end at or after the token
(DeepSeekMath section 4.1.3).

A reward may be missing (None: nobody could tell). Such an answer is left out: mean and deviation are those of
the others, and it gets no advantage. A group whose rewards are all equal teaches nothing; it is found by
comparing the rewards themselves, since the deviation of equal numbers need not come out as zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

# group: (r - mean) / std, that of a sample (N - 1); mean: r - mean; rloo: r - mean of the others.
AdvantageKind = Literal["group", "mean", "rloo"]
# Why a group is not trained on: no two rewards, or all of them equal.
GroupReason = Literal["", "too_few_rewards", "equal_rewards"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """The advantages of one group, in the order of its answers.

    Attributes:
        values: one an answer; None where the reward is missing, and everywhere if there is a reason.
        reason: why the group is left out; empty if it is used.
    """

    values: tuple[float | None, ...]
    reason: GroupReason = ""

    @property
    def is_used(self) -> bool:
        """Whether the group is trained on."""
        return self.reason == ""


LARGEST_REWARD = 1e300  # so that no difference of two rewards overflows


def _check_finite(op: str, rewards: Sequence[float]) -> None:
    wrong = next((reward for reward in rewards if not abs(reward) <= LARGEST_REWARD), None)
    if wrong is not None:
        raise ValueError(f"{op}: rewards must be finite (None where one is missing), got {wrong}")


def group_mean(values: Sequence[float]) -> float:
    """The mean; exactly the common value where all are equal."""
    if not values:
        raise ValueError("group_mean: values must hold at least one number, got none")
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def group_std(values: Sequence[float]) -> float:
    """The standard deviation of a sample (divided by N - 1), exactly 0 where all values are equal."""
    if len(values) < 2:
        raise ValueError(f"group_std: values must hold at least two numbers, got {len(values)}")
    mean = group_mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _reason(rewards: Sequence[float]) -> GroupReason:
    if len(rewards) < 2:
        return "too_few_rewards"
    return "equal_rewards" if min(rewards) == max(rewards) else ""


def _standardised(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std of rewards that are not all equal."""
    # First stretched over [0, 1]: the squares of tiny differences would vanish.
    least, span = min(rewards), max(rewards) - min(rewards)
    stretched = [(reward - least) / span for reward in rewards]
    mean, std = group_mean(stretched), group_std(stretched)
    return [(value - mean) / std for value in stretched]


def _centred(rewards: Sequence[float], kind: AdvantageKind) -> list[float]:
    if kind == "group":
        return _standardised(rewards)
    mean = group_mean(rewards)
    # r minus the mean of the others is r minus the mean of all, times N / (N - 1).
    factor = len(rewards) / (len(rewards) - 1) if kind == "rloo" else 1.0
    return [(reward - mean) * factor for reward in rewards]


def group_advantages(rewards: Sequence[float | None], *, kind: AdvantageKind = "group") -> GroupAdvantages:
    """The advantage of each answer of a group over the others, from one reward an answer.

    Bounded whatever the rewards are under kind "group": by (N - 1) / sqrt(N).

    Raises:
        ValueError: a reward is not finite, or an unknown kind.
    """
    if kind not in get_args(AdvantageKind):
        kinds = ", ".join(get_args(AdvantageKind))
        raise ValueError(f"group_advantages: kind must be one of {kinds}, got {kind!r}")
    present = [reward for reward in rewards if reward is not None]
    _check_finite("group_advantages", present)
    reason = _reason(present)
    if reason:
        return GroupAdvantages(values=(None,) * len(rewards), reason=reason)
    found = iter(_centred(present, kind))
    return GroupAdvantages(values=tuple(None if reward is None else next(found) for reward in rewards))


def process_advantages(
    step_rewards: Sequence[Sequence[float | None] | None],
    step_ends: Sequence[Sequence[int]],
    *,
    num_tokens: Sequence[int],
    kind: AdvantageKind = "group",
) -> tuple[tuple[tuple[float, ...] | None, ...], GroupReason]:
    """The advantage of each token of each answer, from a reward for each step of reasoning.

    Args:
        step_rewards: by answer, the rewards of its steps, which are compared with those of all steps of the
            group. A missing one counts as their mean, 0 once they are compared; without any, or with None in
            place of them all, the answer is left out.
        step_ends: by answer, how many tokens it has up to the end of each step, ascending.
        num_tokens: by answer, how many tokens it has; those after its last step get 0.
        kind: group, or mean for no division by the deviation. There is no rloo of steps: the others of a
            step would be other answers, or other steps.

    Returns:
        by answer, one advantage a token (None where rewards are missing), and why the group is left out, in
        which case all are None.
    """
    if not len(step_rewards) == len(step_ends) == len(num_tokens):
        raise ValueError(
            "process_advantages: step_rewards, step_ends and num_tokens must be as many, "
            f"got {len(step_rewards)}, {len(step_ends)} and {len(num_tokens)}"
        )
    if kind not in ("group", "mean"):
        raise ValueError(f"process_advantages: kind must be group or mean, got {kind!r}")
    for answer_idx, (rewards, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        _check_steps(answer_idx, rewards, ends, num_tokens[answer_idx])
    by_answer = [[reward for reward in rewards or () if reward is not None] for rewards in step_rewards]
    present = [reward for rewards in by_answer for reward in rewards]
    _check_finite("process_advantages", present)
    # The steps of one answer alone are no group.
    reason = _reason(present) if sum(map(bool, by_answer)) > 1 else "too_few_rewards"
    if reason:
        return (None,) * len(step_rewards), reason
    found = iter(_centred(present, kind))
    return tuple(
        _sums_from([0.0 if reward is None else next(found) for reward in rewards], ends, length)
        if rewards and there
        else None
        for rewards, there, ends, length in zip(step_rewards, by_answer, step_ends, num_tokens, strict=True)
    ), ""


def _check_steps(
    answer_idx: int, rewards: Sequence[float | None] | None, ends: Sequence[int], num_tokens: int
) -> None:
    if rewards is None:
        return
    is_ascending = list(ends) == sorted(set(ends)) and all(0 < end <= num_tokens for end in ends)
    if len(rewards) != len(ends) or not is_ascending:
        raise ValueError(
            f"process_advantages: answer {answer_idx} must have one end in (0, {num_tokens}] a reward, "
            f"ascending, got ends {list(ends)} for {len(rewards)} rewards"
        )


def _sums_from(values: Sequence[float], ends: Sequence[int], num_tokens: int) -> tuple[float, ...]:
    """For each token, the sum of the values of the steps that end at or after it."""
    sums = [0.0] * num_tokens
    total, end_after = 0.0, num_tokens
    for step_idx in range(len(values) - 1, -1, -1):
        sums[ends[step_idx] : end_after] = [total] * (end_after - ends[step_idx])
        total, end_after = total + values[step_idx], ends[step_idx]
    sums[:end_after] = [total] * end_after
    return tuple(sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    """What an answer of a group counts.

    Attributes:
        outcome: the advantage by its own reward; None where there is none.
        steps: the advantage of the tokens of each of its steps; empty where there is none.
        reason: why the whole group is left out; empty if it is used.
    """

    outcome: float | None
    steps: tuple[float, ...] = ()
    reason: GroupReason = ""


def step_credits(
    step_rewards: Sequence[Sequence[float | None]],
    step_ends: Sequence[Sequence[int]],
    outcomes: GroupAdvantages,
    *,
    outcome_weight: float,
    kind: AdvantageKind = "group",
) -> list[Credit]:
    """`process_advantages` a step, plus `outcome_weight` times the answer's own advantage.

    Where one of the two is missing it counts 0, that of an answer like its group; where both are (or the one
    that counts is) the answer has no advantage. The group is left out where neither compares anything.
    """
    by_token, reason = process_advantages(
        step_rewards, step_ends, num_tokens=[max(ends, default=0) for ends in step_ends], kind=kind
    )
    has_outcomes = outcome_weight > 0 and outcomes.is_used
    credits = []
    for process, ends, outcome in zip(by_token, step_ends, outcomes.values, strict=True):
        counted = outcome if has_outcomes else None
        parts = [0.0] * len(ends) if process is None else [process[end - 1] for end in ends]
        is_missing = process is None and counted is None
        credits.append(
            Credit(
                outcome=outcome,
                steps=() if is_missing else tuple(part + outcome_weight * (counted or 0.0) for part in parts),
                reason="" if has_outcomes else reason,
            )
        )
    return credits
