"""Each kind of routing is what its name says, for the op that reads logits too."""

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing import cases

V2_LITE = {"num_tokens": 2000, "num_experts": 64, "num_topk": 6}
V2 = {"num_tokens": 2000, "num_experts": 160, "num_topk": 6}


def tokens_per_expert(idx_TK: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(idx_TK.flatten(), minlength=num_experts).double()


@pytest.mark.parametrize("kind", cases.ROUTINGS)
@pytest.mark.parametrize("size", [V2_LITE, V2])
def test_experts_of_a_token_are_distinct(kind: str, size: dict[str, int]) -> None:
    idx_TK = cases.routing(cases.generator(kind), **size, kind=kind)
    assert (idx_TK.dtype, idx_TK.shape) == (torch.int32, (2000, 6))
    assert (idx_TK.sort(dim=1).values.diff(dim=1) > 0).all()
    assert 0 <= int(idx_TK.min()) <= int(idx_TK.max()) < size["num_experts"]


def test_uniform_routing_keeps_every_expert_near_the_mean() -> None:
    load_E = tokens_per_expert(cases.routing(cases.generator("a"), **V2_LITE), 64)
    assert load_E.std() / load_E.mean() < 0.15
    assert load_E.min() > 100


def test_skewed_routing_spreads_as_a_dirichlet_of_concentration_two() -> None:
    """Shares of concentration 2 deviate by 1 / sqrt(2) of their mean; distinct experts flatten that."""
    spreads = []
    for i in range(8):
        idx_TK = cases.routing(cases.generator(f"skewed {i}"), **V2, kind="skewed")
        load_E = tokens_per_expert(idx_TK, 160)
        spreads.append(float(load_E.std() / load_E.mean()))
    assert 0.55 < sum(spreads) / len(spreads) < 0.75


def test_one_hot_routing_gives_all_tokens_the_same_experts_in_their_own_order() -> None:
    idx_TK = cases.routing(cases.generator("a"), **V2, kind="one_hot")
    assert idx_TK.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert len(idx_TK.unique(dim=0)) > 500


def test_half_empty_routing_leaves_the_second_half_of_the_experts_alone() -> None:
    load_E = tokens_per_expert(cases.routing(cases.generator("a"), **V2, kind="half_empty"), 160)
    assert (load_E[:80] > 0).all()
    assert (load_E[80:] == 0).all()


def test_half_empty_routing_has_room_for_every_choice() -> None:
    idx_TK = cases.routing(cases.generator("a"), num_tokens=9, num_experts=7, num_topk=6, kind="half_empty")
    assert idx_TK.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 9


@pytest.mark.parametrize("kind", cases.ROUTINGS)
def test_the_gate_follows_the_logits(kind: str) -> None:
    logits_TE = cases.routing_logits(cases.generator(kind), **V2_LITE, kind=kind)
    idx_TK, _ = ops.moe_gate(logits_TE, num_topk=6)
    torch.testing.assert_close(idx_TK, cases.routing(cases.generator(kind), **V2_LITE, kind=kind))


@pytest.mark.parametrize(("kind", "last"), [("one_hot", 5), ("half_empty", 79)])
def test_the_gate_with_groups_keeps_the_kind(kind: str, last: int) -> None:
    logits_TE = cases.routing_logits(cases.generator(kind), **V2, kind=kind)
    idx_TK, _ = ops.moe_gate(logits_TE, num_topk=6, num_groups=8, num_groups_kept=3)
    assert idx_TK.unique().tolist() == list(range(last + 1))


@pytest.mark.parametrize("kind", cases.ROUTINGS)
@pytest.mark.parametrize("num_experts", [160, 512])
def test_no_two_logits_of_a_token_are_equal(kind: str, num_experts: int) -> None:
    logits_TE = cases.routing_logits(
        cases.generator(kind), num_tokens=3000, num_experts=num_experts, num_topk=6, kind=kind
    )
    assert (logits_TE.sort(dim=1).values.diff(dim=1) > 0).all()


def test_another_kind_is_refused() -> None:
    message = r"^kind must be one of uniform, skewed, one_hot, half_empty, got 'lumpy'$"
    with pytest.raises(ValueError, match=message):
        cases.routing(cases.generator("a"), **V2, kind="lumpy")
