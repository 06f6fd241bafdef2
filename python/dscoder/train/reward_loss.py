"""What a reward model learns: the order of two answers, or the pass rate of each.

Pairwise is the loss of Bradley and Terry (InstructGPT eq. 1) with a margin: -log sigmoid(chosen - rejected -
margin), where the margin is larger the more the pass rates differ (as in Llama 2, section 3.2.2). Only
differences matter to it, so scores may drift; centring adds the squared sum of the two. Pointwise is the
cross-entropy of sigmoid(score) with the pass rate, so a score is the log-odds of passing.
"""

import torch.nn.functional as F
from torch import Tensor


def pairwise_losses(
    chosen_B: Tensor, rejected_B: Tensor, *, margin_B: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """The loss of each pair, [B].

    Args:
        chosen_B, rejected_B: scores.
        margin_B: by how much the chosen score should exceed the other; None: 0.
        centring: weight of (chosen + rejected)^2.
    """
    if chosen_B.shape != rejected_B.shape:
        raise ValueError(
            f"pairwise_losses: chosen_B and rejected_B must have one shape, got {list(chosen_B.shape)} and "
            f"{list(rejected_B.shape)}"
        )
    gap_B = chosen_B - rejected_B
    losses_B = -F.logsigmoid(gap_B if margin_B is None else gap_B - margin_B)
    if centring:
        losses_B = losses_B + centring * (chosen_B + rejected_B).square()
    return losses_B


def pointwise_losses(score_B: Tensor, rate_B: Tensor) -> Tensor:
    """The loss of each answer, [B]: cross-entropy of sigmoid(score) with the pass rate in [0, 1]."""
    return F.binary_cross_entropy_with_logits(score_B, rate_B.to(score_B), reduction="none")
