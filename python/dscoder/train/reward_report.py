"""How well a reward model orders answers to prompts it never saw, and how far its scores can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dscoder.config.reward import RewardLossConfig
from dscoder.models import ScalarModel
from dscoder.train.calibration import ReliabilityBin, expected_calibration_error, reliability
from dscoder.train.reward_data import PreferenceSet, ScoredPair
from dscoder.train.reward_loss import pairwise_losses, pointwise_losses
from dscoder.train.scoring import score_sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutReport:
    """What the scores of held-out answers say.

    Attributes:
        accuracy: share of pairs in their order; a tie counts half.
        shorter_accuracy: the same of a rule that knows nothing but length: the shorter answer is better.
        loss: the mean of what is learnt, on these answers.
        order_error: expected calibration error of sigmoid(difference of scores) as the probability of the
            order that the scores say; `order_bins` are over [0.5, 1].
        rate_error: of sigmoid(score) as the pass rate; None for a pairwise loss, whose scores have no zero.
    """

    num_pairs: int
    num_answers: int
    accuracy: float
    shorter_accuracy: float
    loss: float
    order_error: float
    order_bins: list[ReliabilityBin]
    rate_error: float | None
    rate_bins: list[ReliabilityBin] | None

    def figures(self) -> dict[str, float]:
        """The numbers that a run's metrics show."""
        figures = {
            "held_out_accuracy": self.accuracy,
            "held_out_loss": self.loss,
            "held_out_order_error": self.order_error,
        }
        return figures if self.rate_error is None else figures | {"held_out_rate_error": self.rate_error}

    def record(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self)


def _order(ahead: float) -> float:
    """1 for the right order, 0 for the wrong one, a half for none."""
    return 0.5 if ahead == 0 else float(ahead > 0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report_scores(
    found: PreferenceSet, pairs: Sequence[ScoredPair], scores: Sequence[float], loss: RewardLossConfig
) -> HeldOutReport:
    """The report on `pairs`, from the scores of all answers of `found`; there is at least one pair."""
    ahead = [scores[pair.chosen] - scores[pair.rejected] for pair in pairs]
    places = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
    # The order that the scores say is the right one where `ahead` is positive.
    confidence = [1.0 / (1.0 + math.exp(-abs(value))) for value in ahead]
    order_bins = reliability(confidence, [_order(value) for value in ahead], low=0.5)
    rate_bins = None
    if loss.kind == "pointwise":
        stated = torch.tensor([scores[place] for place in places], dtype=torch.float64).sigmoid().tolist()
        rate_bins = reliability(stated, [found.answers[place].pass_rate for place in places])
    shorter = [
        found.answers[pair.rejected].num_characters - found.answers[pair.chosen].num_characters
        for pair in pairs
    ]
    return HeldOutReport(
        num_pairs=len(pairs),
        num_answers=len(places),
        accuracy=_mean([_order(value) for value in ahead]),
        shorter_accuracy=_mean([_order(value) for value in shorter]),
        loss=_loss(found, pairs, places, scores, loss),
        order_error=expected_calibration_error(order_bins),
        order_bins=order_bins,
        rate_error=None if rate_bins is None else expected_calibration_error(rate_bins),
        rate_bins=rate_bins,
    )


def _loss(
    found: PreferenceSet,
    pairs: Sequence[ScoredPair],
    places: Sequence[int],
    scores: Sequence[float],
    loss: RewardLossConfig,
) -> float:
    score_B = torch.tensor(scores, dtype=torch.float64)
    if loss.kind == "pointwise":
        rate_B = torch.tensor([found.answers[place].pass_rate for place in places], dtype=torch.float64)
        return float(pointwise_losses(score_B[list(places)], rate_B).mean())
    losses_B = pairwise_losses(
        score_B[[pair.chosen for pair in pairs]],
        score_B[[pair.rejected for pair in pairs]],
        margin_B=torch.tensor([loss.margin * found.gap(pair) for pair in pairs], dtype=torch.float64),
        centring=loss.centring,
    )
    return float(losses_B.mean())


def held_out_report(
    model: ScalarModel, found: PreferenceSet, loss: RewardLossConfig, *, max_pairs: int | None = None
) -> HeldOutReport:
    """Score the answers of the first `max_pairs` pairs (None: of all), and report."""
    pairs = found.pairs[:max_pairs]
    places = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
    scored = score_sequences(model, [found.answers[place].ids for place in places])
    by_place = dict(zip(places, scored, strict=True))
    scores = [by_place.get(place, 0.0) for place in range(len(found.answers))]
    return report_scores(found, pairs, scores, loss)
