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


@pytest.mark.parametrize("ends", [[2, 2], [3, 1], [0, 1], [1, 5], [1]])
def test_steps_that_do_not_fit_the_answer_are_named(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"answer 0 must have one end in \(0, 4\] a reward, ascending, got"):
        process_advantages([[1.0, 0.0]], [ends], num_tokens=[4])


def test_answers_must_be_as_many_as_their_steps() -> None:
    with pytest.raises(ValueError, match="must be as many, got 1, 2 and 1"):
        process_advantages([[1.0]], [[1], [1]], num_tokens=[1])
