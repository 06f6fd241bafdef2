"""Advantages on groups small enough to work out by hand."""

import math

import pytest
import torch

from dscoder.train.advantage import (
    GroupAdvantages,
    group_advantages,
    group_mean,
    group_std,
    process_advantages,
    step_credits,
)


def test_a_group_is_centred_and_scaled_by_its_sample_deviation() -> None:
    # mean 0.5, deviation sqrt((4 * 0.25) / 3)
    found = group_advantages([1.0, 0.0, 0.0, 1.0]).values
    half_over_std = 0.5 * math.sqrt(3)
    assert found == pytest.approx([half_over_std, -half_over_std, -half_over_std, half_over_std])


def test_without_deviation_a_group_is_centred_only() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0], kind="mean").values == (0.5, -0.5, -0.5, 0.5)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    rewards = [3.0, 1.0, 2.0]
    wanted = [3.0 - 1.5, 1.0 - 2.5, 2.0 - 2.0]
    assert group_advantages(rewards, kind="rloo").values == pytest.approx(wanted)


def test_mean_and_deviation_are_those_of_torch() -> None:
    values = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert group_mean(values.tolist()) == pytest.approx(values.mean().item(), rel=1e-14)
    assert group_std(values.tolist()) == pytest.approx(values.std().item(), rel=1e-14)


def test_equal_rewards_leave_the_group_out_by_comparison_not_by_deviation() -> None:
    rewards = [0.1 + 0.2] * 7  # whose float sum divided by 7 is another number
    assert sum(rewards) / 7 != rewards[0]
    assert group_advantages(rewards) == GroupAdvantages(values=(None,) * 7, reason="equal_rewards")
    assert not group_advantages(rewards).is_used


def test_rewards_that_differ_in_the_last_bit_are_not_equal() -> None:
    found = group_advantages([1.0, math.nextafter(1.0, 2.0)])
    assert found.is_used
    assert found.values == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("rewards", [[0.0, 5e-324], [0.0, 1e-200], [-1e-320, 0.0, 0.0]])
def test_rewards_whose_squares_vanish_are_told_apart(rewards: list[float]) -> None:
    wanted = group_advantages([float(reward == max(rewards)) for reward in rewards]).values
    assert group_advantages(rewards).values == pytest.approx(wanted)


def test_a_missing_reward_is_left_out_and_does_not_count_as_zero() -> None:
    found = group_advantages([4.0, None, 2.0], kind="mean")
    assert found.values == (1.0, None, -1.0)
    assert group_advantages([1.0, None, 1.0]).reason == "equal_rewards"


@pytest.mark.parametrize("rewards", [[], [1.0], [None, 1.0], [None, None]])
def test_fewer_than_two_rewards_leave_the_group_out(rewards: list[float | None]) -> None:
    found = group_advantages(rewards)
    assert found.reason == "too_few_rewards"
    assert found.values == (None,) * len(rewards)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"group_advantages: rewards must be finite .* got nan"):
        group_advantages([1.0, math.nan])
    with pytest.raises(ValueError, match="kind must be one of group, mean, rloo, got 'z'"):
        group_advantages([1.0, 0.0], kind="z")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_mean: values must hold at least one number"):
        group_mean([])
    with pytest.raises(ValueError, match="group_std: values must hold at least two numbers, got 1"):
        group_std([1.0])


def test_a_token_gets_the_rewards_of_the_steps_that_end_at_or_after_it() -> None:
    # Rewards 1, 0 and 2: mean 1, deviation 1, so the steps are worth 0, -1 and 1.
    values, reason = process_advantages([[1.0, 0.0], [2.0]], [[2, 3], [1]], num_tokens=[4, 2])
    assert reason == ""
    assert values == ((-1.0, -1.0, -1.0, 0.0), (1.0, 0.0))


def test_one_step_an_answer_is_outcome_supervision() -> None:
    rewards = [0.3, 0.9, 0.1]
    values, _ = process_advantages([[r] for r in rewards], [[3]] * 3, num_tokens=[3] * 3)
    for by_token, wanted in zip(values, group_advantages(rewards).values, strict=True):
        assert by_token == pytest.approx([wanted] * 3)


def test_steps_without_rewards_are_left_out() -> None:
    values, reason = process_advantages([None, [1.0], [3.0]], [[], [1], [1]], num_tokens=[2, 1, 1])
    assert values[0] is None
    assert reason == ""
    assert process_advantages([[1.0], [1.0]], [[1], [1]], num_tokens=[1, 1]) == (
        (None, None),
        "equal_rewards",
    )
    assert process_advantages([None, [1.0]], [[], [1]], num_tokens=[1, 1])[1] == "too_few_rewards"


def test_a_missing_step_reward_is_that_of_the_mean_and_no_zero() -> None:
    # Of 1, 3 and 5 (mean 3, deviation 2); the missing one between counts 0, whatever the mean is.
    values, _ = process_advantages([[1.0, None], [3.0, 5.0]], [[1, 2], [1, 2]], num_tokens=[2, 2])
    assert values == ((-1.0, 0.0), (1.0, 1.0))
    shifted, _ = process_advantages([[101.0, None], [103.0, 105.0]], [[1, 2], [1, 2]], num_tokens=[2, 2])
    assert shifted == values
    # Without any it is no answer to compare; the steps of one answer alone are no group.
    found = process_advantages([[None], [1.0, 2.0]], [[1], [1, 2]], num_tokens=[1, 2])
    assert found == ((None, None), "too_few_rewards")


def test_steps_may_be_compared_without_the_deviation() -> None:
    values, _ = process_advantages([[1.0, 0.0], [5.0]], [[2, 3], [1]], num_tokens=[3, 1], kind="mean")
    assert values == ((-3.0, -3.0, -2.0), (3.0,))
    with pytest.raises(ValueError, match="process_advantages: kind must be group or mean, got 'rloo'"):
        process_advantages([[1.0]], [[1]], num_tokens=[1], kind="rloo")


def test_each_step_is_credited_with_what_follows_it() -> None:
    rewards, ends = [[1.0, 0.0], [2.0]], [[2, 3], [4]]
    outcomes = group_advantages([1.0, 0.0], kind="mean")
    alone = step_credits(rewards, ends, outcomes, outcome_weight=0.0)
    assert [credit.steps for credit in alone] == [(-1.0, -1.0), (1.0,)]
    assert [credit.outcome for credit in alone] == [0.5, -0.5]
    mixed = step_credits(rewards, ends, outcomes, outcome_weight=2.0)
    assert [credit.steps for credit in mixed] == [(0.0, 0.0), (0.0,)]


def test_what_is_missing_of_steps_or_outcome_counts_as_the_group_does() -> None:
    rewards = [[1.0], [3.0], [None], [None]]
    outcomes = group_advantages([1.0, None, 3.0, None], kind="mean")
    credits = step_credits(rewards, [[1]] * 4, outcomes, outcome_weight=1.0, kind="mean")
    assert [credit.steps for credit in credits] == [(-2.0,), (1.0,), (1.0,), ()]
    alone = step_credits(rewards, [[1]] * 4, outcomes, outcome_weight=0.0, kind="mean")
    assert [credit.steps for credit in alone] == [(-1.0,), (1.0,), (), ()]


def test_a_group_is_left_out_where_neither_steps_nor_outcomes_differ() -> None:
    equal, differ = group_advantages([1.0, 1.0]), group_advantages([1.0, 0.0])
    by_outcome = step_credits([[2.0], [2.0]], [[1], [1]], differ, outcome_weight=1.0)
    assert [credit.reason for credit in by_outcome] == ["", ""]
    assert by_outcome[0].steps == (pytest.approx(0.5**0.5),)
    for outcomes, weight in ((equal, 1.0), (differ, 0.0)):
        credits = step_credits([[2.0], [2.0]], [[1], [1]], outcomes, outcome_weight=weight)
        assert [(credit.reason, credit.steps) for credit in credits] == [("equal_rewards", ())] * 2


@pytest.mark.parametrize("ends", [[2, 2], [3, 1], [0, 1], [1, 5], [1]])
def test_steps_that_do_not_fit_the_answer_are_named(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"answer 0 must have one end in \(0, 4\] a reward, ascending, got"):
        process_advantages([[1.0, 0.0]], [ends], num_tokens=[4])


def test_answers_must_be_as_many_as_their_steps() -> None:
    with pytest.raises(ValueError, match="must be as many, got 1, 2 and 1"):
        process_advantages([[1.0]], [[1], [1]], num_tokens=[1])
