"""The losses of a reward model: closed forms, gradients, and TRL's formula derived anew."""

import math

import pytest
import torch
from torch import Tensor

from dscoder.train.reward_loss import pairwise_losses, pointwise_losses


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_equal_scores_cost_the_logarithm_of_two() -> None:
    torch.testing.assert_close(pairwise_losses(of(3.0), of(3.0)), of(math.log(2)))


def test_a_margin_moves_the_scores_apart_by_itself() -> None:
    got = pairwise_losses(of(2.0, 2.0), of(0.5, 0.5), margin_B=of(1.5, 0.0))
    torch.testing.assert_close(got, of(math.log(2), math.log(1 + math.exp(-1.5))))


def test_centring_adds_the_squared_sum() -> None:
    got = pairwise_losses(of(2.0), of(1.0), centring=0.1) - pairwise_losses(of(2.0), of(1.0))
    torch.testing.assert_close(got, of(0.9))


def test_only_differences_count_without_centring() -> None:
    one, other = pairwise_losses(of(2.0), of(1.0)), pairwise_losses(of(102.0), of(101.0))
    torch.testing.assert_close(one, other)


def test_the_gradient_is_the_probability_of_the_wrong_order() -> None:
    chosen_B, rejected_B = of(0.3, -2.0).requires_grad_(), of(1.0, -5.0).requires_grad_()
    pairwise_losses(chosen_B, rejected_B, margin_B=of(0.5, 0.25)).sum().backward()
    wrong_B = torch.sigmoid(of(-(0.3 - 1.0 - 0.5), -(3.0 - 0.25)))
    torch.testing.assert_close(chosen_B.grad, -wrong_B)
    torch.testing.assert_close(rejected_B.grad, wrong_B)


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("has_margin", [False, True])
def test_the_mean_is_the_loss_of_trl(has_margin: bool, centring: float) -> None:
    generator = torch.Generator().manual_seed(int(has_margin))
    chosen_B, rejected_B, margin_B = torch.randn(3, 64, generator=generator, dtype=torch.float64) * 3
    # RewardTrainer.compute_loss (trl 1.x), with the logarithm of the sigmoid written out.
    gap_B = chosen_B - rejected_B - (margin_B if has_margin else 0.0)
    wanted = torch.log1p(torch.exp(-gap_B)).mean()
    wanted = wanted + centring * torch.mean((chosen_B + rejected_B) ** 2)
    got = pairwise_losses(
        chosen_B, rejected_B, margin_B=margin_B if has_margin else None, centring=centring
    ).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_scores_far_apart_stay_finite() -> None:
    losses_B = pairwise_losses(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert losses_B.tolist() == [2e4, 0.0]


def test_a_pass_rate_is_learnt_as_log_odds() -> None:
    rate_B = of(0.2, 0.5, 0.9)
    score_B = torch.logit(rate_B).requires_grad_()
    losses_B = pointwise_losses(score_B, rate_B)
    entropy_B = -(rate_B * rate_B.log() + (1 - rate_B) * (1 - rate_B).log())
    torch.testing.assert_close(losses_B, entropy_B)
    losses_B.sum().backward()
    torch.testing.assert_close(score_B.grad, torch.zeros(3, dtype=torch.float64))


def test_the_pointwise_gradient_is_prediction_minus_rate() -> None:
    score_B = of(0.0, 2.0).requires_grad_()
    pointwise_losses(score_B, of(1.0, 0.25)).sum().backward()
    torch.testing.assert_close(score_B.grad, torch.sigmoid(of(0.0, 2.0)) - of(1.0, 0.25))


def test_scores_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got \[2\] and \[1\]"):
        pairwise_losses(of(1.0, 2.0), of(1.0))
