"""What a report says about scores."""

import math

import pytest

from dscoder.config.reward import RewardLossConfig
from dscoder.train.reward_data import PreferenceSet, ScoredAnswer, ScoredPair
from dscoder.train.reward_report import report_scores

PAIRS = [ScoredPair(chosen=0, rejected=1), ScoredPair(chosen=2, rejected=3)]


def answers() -> PreferenceSet:
    rates, lengths = (1.0, 0.0, 0.5, 0.25), (10, 20, 30, 5)
    found = PreferenceSet.empty()
    found.answers = [
        ScoredAnswer(ids=(1,), pass_rate=rate, num_characters=length)
        for rate, length in zip(rates, lengths, strict=True)
    ]
    found.pairs = PAIRS
    return found


def test_accuracy_counts_pairs_in_their_order_and_ties_by_half() -> None:
    loss = RewardLossConfig()
    assert report_scores(answers(), PAIRS, [1.0, 0.0, 3.0, 2.0], loss).accuracy == 1.0
    assert report_scores(answers(), PAIRS, [1.0, 0.0, 2.0, 3.0], loss).accuracy == 0.5
    assert report_scores(answers(), PAIRS, [1.0, 1.0, 3.0, 2.0], loss).accuracy == 0.75


def test_length_alone_is_reported_beside_it() -> None:
    assert report_scores(answers(), PAIRS, [0.0] * 4, RewardLossConfig()).shorter_accuracy == 0.5


def test_the_loss_is_that_of_training() -> None:
    report = report_scores(answers(), PAIRS, [2.0, 1.0, 0.0, 0.0], RewardLossConfig(margin=2.0))
    wanted = [math.log1p(math.exp(-(1.0 - 2.0))), math.log1p(math.exp(0.5))]
    assert report.loss == pytest.approx(sum(wanted) / 2)


def test_confident_and_wrong_is_a_calibration_error() -> None:
    right = report_scores(answers(), PAIRS, [20.0, 0.0, 20.0, 0.0], RewardLossConfig())
    wrong = report_scores(answers(), PAIRS, [0.0, 20.0, 0.0, 20.0], RewardLossConfig())
    assert right.order_error == pytest.approx(0.0, abs=1e-6)
    assert wrong.order_error == pytest.approx(1.0, abs=1e-6)
    assert [item.count for item in right.order_bins] == [0] * 9 + [2]


def test_pass_rates_are_compared_for_a_pointwise_loss_alone() -> None:
    odds = [4.0, -4.0, 0.0, math.log(0.25 / 0.75)]
    report = report_scores(answers(), PAIRS, odds, RewardLossConfig(kind="pointwise", margin=0.0))
    assert report.rate_error == pytest.approx(2 * (1 / (1 + math.exp(4))) / 4, rel=1e-6)
    assert "held_out_rate_error" in report.figures()
    pairwise = report_scores(answers(), PAIRS, odds, RewardLossConfig())
    assert pairwise.rate_error is None
    assert "held_out_rate_error" not in pairwise.figures()
