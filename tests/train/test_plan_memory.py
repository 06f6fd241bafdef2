"""What a plan says of the memory of a run."""

from dataclasses import replace

import pytest

from dscoder.config import preset
from dscoder.config.plan import Precision
from dscoder.models import count_parameters
from dscoder.testing.ranks import run_ranks
from dscoder.train.plan import memory as memory_module
from dscoder.train.plan.activations import Tokens
from dscoder.train.plan.layout import Layout
from dscoder.train.plan.memory import CONTEXT_BYTES, Memory, memory, states
from dscoder.train.plan.weights import (
    dense_numel,
    gathered_numel,
    held_numel,
    local_experts_numel,
    weights_of,
)
from tests.models.sharded import tiny
from tests.train.held_bytes import held_bytes

V2 = preset("v2")
DENSE = replace(preset("tiny_dense"), num_layers=1)
TOKENS = Tokens(sequences=1, length=1, item=2)


def dense_memory(layout: Layout, *, num_rounds: int = 1, precision: Precision = "bf16") -> Memory:
    return memory(
        DENSE,
        layout,
        weights_of(DENSE),
        TOKENS,
        precision=precision,
        num_rounds=num_rounds,
        per_node=8,
        slack=1.0,
    )


@pytest.mark.parametrize("name", ["v2", "v2_lite", "coder_33b", "tiny_moe"])
def test_all_parameters_are_in_a_unit(name: str) -> None:
    model = preset(name)
    weights = weights_of(model)
    assert weights.sum_over(lambda unit: held_numel(unit, Layout())) == count_parameters(model).total
    assert sum(kind.count for kind in weights.kinds) == model.num_layers


def test_a_tied_table_is_one() -> None:
    model = preset("tiny_moe")
    weights = weights_of(replace(model, tie_embeddings=True))
    assert dense_numel(weights_of(model).root) - dense_numel(weights.root) == 4096 * 256


def test_experts_are_divided_first_among_expert_ranks_then_among_the_others() -> None:
    _, moe = weights_of(V2).kinds
    layout = Layout(expert=8, expert_shard=5)
    assert moe.count == 59
    assert local_experts_numel(moe.unit, layout) == 20 * 3 * 1536 * 5120
    held = 4 * 3 * 1536 * 5120 + sum(
        -(-rows // 40) * (shape[0] if shape else 1) for rows, *shape in moe.unit.dense
    )
    assert held_numel(moe.unit, layout) == held


def test_the_first_rank_has_the_row_that_is_left_over() -> None:
    _, moe = weights_of(V2).kinds
    # Five experts do not go into two ranks, their rows do.
    even = held_numel(moe.unit, Layout(expert=32, expert_shard=2))
    dense = held_numel(moe.unit, Layout(expert_shard=64)) - 160 * 3 * 1536 * 5120 // 64
    assert even == dense + 5 * 3 * 1536 * 5120 // 2


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic"])
def test_weights_moments_and_gradients_of_a_rank_are_planned_to_the_byte(precision: Precision) -> None:
    model, layouts = tiny("tiny_moe"), [(1, 1), (2, 1), (1, 2)]
    by_rank = run_ranks(held_bytes, model, precision, layouts, num_ranks=2)
    for (expert, replicate), found in zip(layouts, by_rank[0], strict=True):
        layout = Layout(expert=expert, replicate=replicate, expert_shard=2 // (expert * replicate))
        weights = weights_of(model)
        held = states(weights, layout, precision)
        gradients = 4 * weights.sum_over(lambda unit, layout=layout: held_numel(unit, layout))
        assert found == (held.weights, held.moments, gradients)


def test_a_model_by_hand_at_the_end_of_the_backward_pass() -> None:
    # A layer: two norms, query and out, key and value, three of the MLP. Root: table, head, norm.
    layer = 2 * 256 + 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688
    root = 2 * 4096 * 256 + 256
    found = dense_memory(Layout(expert_shard=2))
    assert found.weights == 4 * (layer + root) / 2
    assert found.moments == 8 * (layer + root) / 2
    assert found.moment == "backward ends"
    assert found.gradients == 4 * (layer + root) / 2
    assert found.gathered == 2 * (root + 2 * layer)
    assert found.working == 6 * root
    assert found.context == CONTEXT_BYTES
    assert found.slack == 0
    assert found.exchange == 0


def test_micro_batches_that_add_up_hold_whole_gradients() -> None:
    layout = Layout(expert_shard=8)
    num_parameters = count_parameters(DENSE).total
    assert dense_memory(layout).gradients == 4 * num_parameters / 8
    assert dense_memory(layout, num_rounds=2).gradients == 4 * num_parameters
    each = replace(layout, sums_each_batch=True)
    added = dense_memory(each, num_rounds=2)
    assert added.gradients == 4 * num_parameters / 8
    # The root's sum of the second round is there beside that of the first, until it is added.
    root = 2 * 4096 * 256 + 256
    assert added.moment == "backward ends"
    assert added.working - dense_memory(layout).working == 4 * root / 8


def test_whole_gradients_of_v2_are_more_than_a_gpu_holds() -> None:
    layout = Layout(expert=8, expert_shard=64)
    whole = 4 * weights_of(V2).sum_over(lambda unit: gathered_numel(unit, layout))
    # All dense parameters, and an eighth of 59 layers of 160 experts.
    num_routed = 59 * 160 * 3 * 1536 * 5120
    assert whole == 4 * (count_parameters(V2).total - num_routed + num_routed // 8) == 163_454_341_120


def test_one_gpu_gathers_nothing_but_keeps_a_bfloat16_copy() -> None:
    num_parameters = count_parameters(DENSE).total
    assert dense_memory(Layout()).gathered == 2 * num_parameters
    assert dense_memory(Layout(), precision="bf16_stochastic").gathered == 0
    assert dense_memory(Layout(), precision="bf16_stochastic").weights == 2 * num_parameters


def test_weights_that_stay_gathered_are_all_there() -> None:
    num_parameters = count_parameters(DENSE).total
    assert dense_memory(Layout(expert_shard=2, reshard=False)).gathered == 2 * num_parameters


def test_slots_for_tokens_both_ways() -> None:
    found = memory(
        V2,
        Layout(expert=8),
        weights_of(V2),
        Tokens(sequences=1, length=4096, item=2),
        precision="bf16",
        num_rounds=1,
        per_node=8,
        slack=1.0,
    )
    # 8 ranks of 4096 tokens; rows out and back, their weights both ways, their experts one way.
    assert found.exchange == 8 * 4096 * (2 * 2 * 5120 + 3 * 4 * 6)


def test_slack_is_of_what_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = dense_memory(Layout(expert_shard=2))
    monkeypatch.setattr(memory_module, "CONTEXT_BYTES", 0)
    loose = memory(
        DENSE,
        Layout(expert_shard=2),
        weights_of(DENSE),
        TOKENS,
        precision="bf16",
        num_rounds=1,
        per_node=8,
        slack=1.5,
    )
    assert loose.slack == (tight.gathered + tight.activations + tight.working) // 2
    assert loose.total == tight.total - CONTEXT_BYTES + loose.slack
