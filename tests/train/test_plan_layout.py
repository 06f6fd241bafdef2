"""Which layouts there are."""

import pytest

from dscoder.config import preset
from dscoder.train.plan.layout import Batch, Choices, Layout, layouts, ranks_on_a_node

V2, DENSE = preset("v2"), preset("coder_1_3b")
BATCH = Batch(sequences=64, length=4096)


def grids(model_name: str, num_ranks: int, **fixed: int) -> set[tuple[int, int, int]]:
    found = layouts(preset(model_name), BATCH, num_ranks=num_ranks, fixed=Choices(**fixed))
    return {(one.replicate, one.expert_shard, one.expert) for one in found}


def test_ranks_are_shared_out_in_every_way() -> None:
    assert grids("coder_1_3b", 4) == {(1, 4, 1), (2, 2, 1), (4, 1, 1)}
    assert grids("v2", 4) == {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)}


def test_expert_ranks_divide_the_experts_and_nest_with_the_groups() -> None:
    # Of 40 ranks: 160 experts divide by 5, 10 and 20 too, but 8 groups do not.
    sizes = {expert for _, _, expert in grids("v2", 40)}
    assert sizes == {1, 2, 4, 8, 40}


def test_fixed_sizes_are_kept() -> None:
    assert grids("v2", 8, expert=4) == {(1, 2, 4), (2, 1, 4)}
    assert grids("v2", 8, expert=4, replicate=2) == {(2, 1, 4)}


def test_every_rank_count_is_the_world() -> None:
    for layout in layouts(V2, BATCH, num_ranks=16, fixed=Choices()):
        assert layout.world == 16
        assert layout.shard * layout.replicate == 16


def test_micro_batches_cut_a_ranks_windows_evenly() -> None:
    found = layouts(DENSE, Batch(sequences=36, length=4096), num_ranks=2, fixed=Choices())
    assert {layout.micro for layout in found} == {1, 2, 3, 6, 9}
    uneven = layouts(DENSE, Batch(sequences=37, length=4096), num_ranks=2, fixed=Choices())
    assert {layout.micro for layout in uneven} == set(range(1, 17))


def test_rounds_are_those_of_the_busiest_rank() -> None:
    batch = Batch(sequences=37, length=4096)
    assert batch.rounds(Layout(micro=4, expert_shard=2)) == 5
    assert batch.rounds(Layout(micro=1, expert_shard=37)) == 1


def test_one_round_has_no_sums_between() -> None:
    found = list(layouts(DENSE, Batch(sequences=4, length=4096), num_ranks=4, fixed=Choices()))
    assert not any(layout.sums_each_batch for layout in found)


@pytest.mark.parametrize(
    ("size", "stride", "world", "per_node", "fewest"),
    [
        (4, 1, 16, 8, 4),
        (16, 1, 16, 8, 8),
        (4, 8, 32, 8, 1),
        (4, 2, 16, 8, 4),  # 0 2 4 6, 1 3 5 7
        (6, 1, 6, 8, 6),  # one node that is not full
        (4, 1, 12, 6, 2),  # 4 5 | 6 7
        (5, 1, 40, 8, 1),  # 5 6 7 | 8 9 and 15 | 16 17 18 19
        (3, 2, 12, 6, 3),
        (3, 3, 9, 3, 1),
    ],
)
def test_the_fewest_ranks_of_a_group_on_a_node(
    size: int, stride: int, world: int, per_node: int, fewest: int
) -> None:
    assert ranks_on_a_node(size, stride=stride, world=world, per_node=per_node) == fewest


def test_slots_differ_between_expert_ranks_alone() -> None:
    assert not any(one.is_exact for one in layouts(DENSE, BATCH, num_ranks=4, fixed=Choices()))
    assert {one.is_exact for one in layouts(V2, BATCH, num_ranks=4, fixed=Choices(expert=4))} == {True, False}


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (Choices(expert=3), "expert must divide the model's num_experts = 160, got 3"),
        (Choices(expert=5), "expert must divide the model's num_groups = 8 or be a multiple of it, got 5"),
        (
            Choices(expert=8, replicate=3),
            "gpus must be a multiple of expert \\* replicate, got 16 and 8 \\* 3",
        ),
        (Choices(expert=32), "gpus must be a multiple of expert, got 16 and 32$"),
        (Choices(micro=8), "batch must have a micro-batch for each of 16 GPUs, got 64 windows in .* of 8"),
    ],
)
def test_what_does_not_go_together_is_refused(fixed: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(layouts(V2, BATCH, num_ranks=16, fixed=fixed))
