"""What a plan says of the bytes between GPUs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dscoder import ops
from dscoder.config import ModelConfig, MoeConfig, preset
from dscoder.testing.ranks import run_ranks
from dscoder.train.plan.exchange import has_peer_transport
from dscoder.train.plan.layout import Layout
from dscoder.train.plan.routing import expected_ranks
from dscoder.train.plan.traffic import Group, StepTraffic, Traffic, step_traffic
from dscoder.train.plan.weights import weights_of
from tests.models.sharded import tiny
from tests.train.sent_bytes import received_on_layouts

V2, LITE = preset("v2"), preset("v2_lite")
TINY = preset("tiny_moe")


def traffic_of(model: ModelConfig, layout: Layout, *, num_rounds: int = 1, per_node: int = 8) -> StepTraffic:
    return step_traffic(
        model,
        layout,
        weights_of(model),
        per_node=per_node,
        num_rounds=num_rounds,
        num_tokens=10,
        item=2,
    )


def simulated_ranks(moe: MoeConfig, num_ranks: int) -> float:
    """Distinct ranks of the choices of `moe_gate` itself, for random scores."""
    generator = torch.Generator().manual_seed(0)
    idx_TK, _ = ops.moe_gate(
        torch.randn(20_000, moe.num_experts, generator=generator),
        num_topk=moe.num_topk,
        num_groups=moe.num_groups,
        num_groups_kept=moe.num_groups_kept,
    )
    rank_TK = idx_TK.long() // (moe.num_experts // num_ranks)
    return float(F.one_hot(rank_TK, num_ranks).amax(dim=1).sum(dim=1).double().mean())


# ---- how many ranks a token goes to ----


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("model", [V2, LITE], ids=["v2", "v2_lite"])
def test_expected_ranks_are_those_of_the_gate(model: ModelConfig, num_ranks: int) -> None:
    assert model.moe is not None
    assert expected_ranks(model.moe, num_ranks) == pytest.approx(
        simulated_ranks(model.moe, num_ranks), rel=0.005
    )


def test_two_draws_of_four_experts_by_hand() -> None:
    moe = MoeConfig(num_experts=4, num_shared_experts=0, num_topk=2, expert_width=1)
    # The second expert is one of three others, one of which is on the first one's rank.
    assert expected_ranks(moe, 2) == pytest.approx(1 + 2 / 3)
    assert expected_ranks(moe, 4) == 2
    # Only one group is kept: both experts are in it.
    assert expected_ranks(replace(moe, num_groups=2), 2) == 1


def test_lite_goes_to_4_5_of_8_ranks_and_v2_to_nearly_three() -> None:
    assert expected_ranks(LITE.moe, 8) == pytest.approx(4.5355, abs=1e-4)
    assert expected_ranks(V2.moe, 8) == pytest.approx(2.9950, abs=1e-4)


def test_without_the_best_experts_rule_it_would_be_fewer() -> None:
    # Six of the sixty experts of three groups drawn at random, whatever made the gate keep these groups.
    moe = replace(V2.moe, num_experts=60, num_groups=1, num_groups_kept=1)
    assert expected_ranks(moe, 3) == pytest.approx(2.77, abs=0.005)


# ---- collectives ----


def test_a_group_on_one_node_uses_its_links_alone() -> None:
    assert Group(size=8, on_node=8).gather(800) == Traffic(link=700, network=0)


def test_neighbours_on_two_nodes_share_what_comes_from_outside() -> None:
    # Each node lacks half, which its eight ranks bring in together.
    found = Group(size=16, on_node=8).gather(1600)
    assert found == Traffic(link=1500 - 100, network=100)


def test_ranks_on_nodes_of_their_own_use_the_network_alone() -> None:
    assert Group(size=4, on_node=1).gather(400) == Traffic(link=0, network=300)


def test_tokens_go_to_other_ranks_as_often_as_to_ones_own() -> None:
    assert Group(size=16, on_node=8).scatter(16, 4) == Traffic(link=4 * 7, network=4 * 8)


# ---- a step ----


def test_weights_are_gathered_twice_a_round_if_freed_and_the_root_once() -> None:
    layout, weights = Layout(expert_shard=8), weights_of(TINY)
    root = 2 * 4096 * 256 + 256
    layers = weights.sum_over(lambda unit: sum(torch.Size(s).numel() for s in (*unit.dense, *unit.experts)))
    layers -= root
    found = traffic_of(TINY, layout, num_rounds=3)
    assert found.gather.link == pytest.approx(2 * (2 * layers + root) * 3 * 7 / 8)
    kept = traffic_of(TINY, replace(layout, reshard=False), num_rounds=3)
    assert kept.gather.link == pytest.approx(2 * (layers + root) * 3 * 7 / 8)


def test_gradients_travel_once_a_step_in_float32_or_each_round() -> None:
    layout = Layout(expert_shard=8)
    once = traffic_of(TINY, layout, num_rounds=3).reduce
    assert once == traffic_of(TINY, layout).reduce
    assert traffic_of(TINY, replace(layout, sums_each_batch=True), num_rounds=3).reduce.link == 3 * once.link
    assert once.link == pytest.approx(2 * traffic_of(TINY, replace(layout, reshard=False)).gather.link)


def test_experts_of_all_ranks_are_never_gathered() -> None:
    spread = traffic_of(TINY, Layout(expert=8))
    dense = weights_of(TINY).sum_over(lambda unit: sum(torch.Size(shape).numel() for shape in unit.dense))
    assert spread.reduce.link == pytest.approx(4 * dense * 7 / 8)


def test_replicas_sum_their_parts() -> None:
    found = traffic_of(TINY, Layout(replicate=2, expert_shard=8), per_node=8)
    num_parameters = weights_of(TINY).sum_over(
        lambda unit: sum(torch.Size(shape).numel() for shape in (*unit.dense, *unit.experts))
    )
    assert found.replicas == Traffic(link=0, network=pytest.approx(2 * 4 * num_parameters / 8 / 2))


def test_a_token_and_its_choices_go_four_ways() -> None:
    found = traffic_of(TINY, Layout(expert=8)).exchange
    row, weights = 2 * 256, 4 * 4
    ranks = expected_ranks(TINY.moe, 8)
    one_layer = 10 * ranks * 7 / 8 * (4 * row + 2 * weights + weights)
    assert found == Traffic(link=pytest.approx(3 * one_layer), network=0)


def test_computing_again_dispatches_again() -> None:
    none, full = (
        traffic_of(TINY, Layout(expert=8, recompute=recompute)).exchange for recompute in ("none", "full")
    )
    selective = traffic_of(TINY, Layout(expert=8, recompute="selective")).exchange
    row, weights = 2 * 256, 4 * 4
    assert selective == none
    assert full.link / none.link == pytest.approx((5 * row + 5 * weights) / (4 * row + 3 * weights))


def test_across_nodes_slots_of_fixed_size_carry_padding() -> None:
    worst, exact = (
        traffic_of(TINY, Layout(expert=16, is_exact=is_exact)).exchange for is_exact in (False, True)
    )
    assert worst.network / exact.network == pytest.approx(16 / expected_ranks(TINY.moe, 16))
    # Kernels on one node send what there is, whatever the slots.
    on_node = [traffic_of(TINY, Layout(expert=8, is_exact=is_exact)).exchange for is_exact in (False, True)]
    assert on_node[0] == on_node[1]


def test_expert_groups_that_straddle_nodes_use_the_network() -> None:
    # Twelve ranks, groups of four: on nodes of six the second group has two ranks on each.
    layout = Layout(expert=4, expert_shard=3)
    assert has_peer_transport(layout, 4)
    assert has_peer_transport(layout, 12)
    assert not has_peer_transport(layout, 6)
    straddling = traffic_of(TINY, layout, per_node=6).exchange
    on_node = traffic_of(TINY, layout, per_node=4).exchange
    assert on_node.network == 0
    # Of the three others one is near; and padding goes to each, as no kernel reaches them.
    assert straddling.network == pytest.approx(2 * straddling.link)
    assert straddling.link == pytest.approx(on_node.link / 3 * 4 / expected_ranks(TINY.moe, 4))


def test_one_gpu_sends_nothing() -> None:
    nothing = Traffic(link=0, network=0)
    found = traffic_of(TINY, Layout())
    assert (found.gather, found.reduce, found.replicas, found.exchange) == (nothing,) * 4


# ---- against what ranks send ----

LAYOUTS = [
    Layout(expert_shard=2),
    Layout(expert=2),
    Layout(expert_shard=2, reshard=False),
    Layout(expert_shard=2, sums_each_batch=True),
    Layout(expert_shard=2, recompute="selective"),
    Layout(expert_shard=2, recompute="full"),
    Layout(expert=2, recompute="full"),
]


@pytest.mark.dist
def test_ranks_receive_what_is_planned_to_the_byte() -> None:
    model, num_rounds = tiny("tiny_moe"), 2
    found = run_ranks(received_on_layouts, model, LAYOUTS, num_rounds, num_ranks=2)
    assert found[0] == found[1]
    for layout, received in zip(LAYOUTS, found[0], strict=True):
        planned = traffic_of(model, layout, num_rounds=num_rounds)
        # Ten tokens, each with every rank that it goes to; half of these are its own.
        num_pairs = num_rounds * 10 * (expected_ranks(model.moe, 2) if layout.expert == 2 else 1)
        wanted = {
            "gather": planned.gather.link,
            "reduce": planned.reduce.link,
            "pair": pytest.approx(2 * planned.exchange.link / num_pairs),
        }
        assert received == wanted, layout
