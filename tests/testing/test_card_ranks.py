"""The checks of processes that share a card, over gloo on the CPU."""

import pytest
import torch

from dscoder.testing import card_ranks
from dscoder.testing.expert_ranks import ExpertCase

pytestmark = pytest.mark.dist


def test_layers_of_two_ranks() -> None:
    cases = tuple(
        ExpertCase(tokens=(7, 3), hidden=16, dtype=dtype, exact=exact)
        for dtype in (torch.bfloat16, torch.float32)
        for exact in (True, False)
    )
    card_ranks.check_layers(cases, device="cpu", transport="collective")


def test_another_transport_than_the_one_asked_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_ranks, "run_ranks", lambda *_, num_ranks, limit: [[("peer", {})]] * num_ranks)
    with pytest.raises(AssertionError):
        card_ranks.check_layers((ExpertCase(tokens=(7, 3)),), device="cpu", transport="collective")


def test_a_rank_that_dies_is_named() -> None:
    card_ranks.check_lost(
        ExpertCase(tokens=(7, 3), hidden=16, exact=False), device="cpu", transport="collective"
    )
