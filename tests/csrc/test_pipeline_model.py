"""The pipeline of the sm_90a products, played in any order of events (dscoder.testing.pipeline)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.testing.examples import FIXED
from dscoder.testing.pipeline import (
    CLUSTER,
    WARPGROUPS,
    WARPS,
    BrokenError,
    Cluster,
    Design,
    Stage,
    explore,
    is_seen,
)
from dscoder.testing.tile_pairs import Job, ProductTile, RowsJob, WeightGradient, ceil_div, fill_groups


def ends_of(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts))


def rows_job(
    counts: Sequence[int], *, depth: int = 152, num_columns: int = 600, swaps: bool = False
) -> RowsJob:
    tile = (32, 128) if swaps else (128, 256)
    return RowsJob(
        offsets=ends_of(counts),
        num_rows=sum(counts) + 9,
        num_columns=num_columns,
        depth=depth,
        tile=tile,
        swaps=swaps,
    )


def weight_gradient(counts: Sequence[int], *, num_columns: int = 136, depth: int = 264) -> WeightGradient:
    return WeightGradient(
        offsets=ends_of(counts),
        num_rows=sum(counts) + 9,
        num_columns=num_columns,
        depth=depth,
        tile=(128, 256),
    )


designs = st.builds(
    Design, num_stages=st.integers(2, 4), multicasts=st.booleans(), skew_blocks=st.integers(0, 3)
).filter(lambda design: design.skew_blocks < design.num_stages)
counts_of_experts = st.lists(st.sampled_from([0, 0, 1, 17, 64, 65, 128, 150, 300]), min_size=1, max_size=7)
jobs = st.one_of(
    st.builds(
        rows_job,
        counts_of_experts,
        depth=st.sampled_from([8, 64, 152, 400]),
        num_columns=st.sampled_from([8, 256, 264, 600]),
        swaps=st.booleans(),
    ),
    st.builds(
        weight_gradient,
        counts_of_experts,
        num_columns=st.sampled_from([8, 136, 300]),
        depth=st.sampled_from([8, 264, 600]),
    ),
)
# Offsets that descend or leave [0, M], as they must not come.
wild_ends = st.lists(st.integers(-50, 700), min_size=1, max_size=6).map(tuple)


@settings(FIXED, max_examples=200)
@given(job=jobs, wild=st.none() | wild_ends)
def test_both_blocks_of_a_cluster_agree_and_tiles_come_once(
    job: RowsJob | WeightGradient, wild: tuple[int, ...] | None
) -> None:
    job = job if wild is None else replace(job, offsets=wild)
    pairs = [[job.tile_at(idx, rank) for rank in range(CLUSTER)] for idx in range(job.num_tile_pairs())]
    for first, second in pairs:
        assert first.num_k_blocks == second.num_k_blocks
        assert (first.group, first.shares_rows) == (second.group, second.shares_rows)
        assert (first.row if first.shares_rows else first.column) == (
            second.row if first.shares_rows else second.column
        )
    rows_end, columns_end = (
        (job.num_rows, job.num_columns) if isinstance(job, RowsJob) else (job.num_columns, job.depth)
    )
    found = [
        (tile.group, tile.row, tile.column) for pair in pairs for tile in pair if tile.column < columns_end
    ]
    if isinstance(job, RowsJob):
        first_row = fill_groups(job.offsets, job.num_rows, lambda rows: 0).first_row
        groups = [(g, first_row[g], first_row[g + 1]) for g in range(len(job.offsets) + 1)]
    else:
        groups = [(g, 0, rows_end) for g in range(len(job.offsets))]
    assert sorted(found) == [
        (group, row, column * job.tile[1])
        for group, begin, end in groups
        for row in range(begin, end, job.tile[0])
        for column in range(ceil_div(columns_end, job.tile[1]))
    ]


@settings(FIXED, max_examples=120)
@given(design=designs, job=jobs, seed=st.integers(0, 2**32), num_clusters=st.integers(1, 3))
def test_any_tiles_in_any_order_come_to_an_end_in_step(
    design: Design, job: Job, seed: int, num_clusters: int
) -> None:
    explore(design, job, seed, num_clusters)


@pytest.mark.parametrize("counts", [[0], [1], [0, 0, 0], [64], [65], [1] * 9, [0, 1, 0, 300, 0], [700]])
@pytest.mark.parametrize(("num_stages", "skew_blocks"), [(2, 0), (2, 1), (3, 2), (4, 2)])
def test_few_blocks_of_depth(counts: list[int], num_stages: int, skew_blocks: int) -> None:
    for seed in range(3):
        explore(Design(num_stages=num_stages, skew_blocks=skew_blocks), weight_gradient(counts), seed)
        explore(Design(num_stages=num_stages, skew_blocks=skew_blocks), rows_job(counts, depth=8), seed)


MISTAKES = {
    "the loader waits for the wrong phase first": Design(load_phase=0),
    "the last stage of a tile is not released": Design(releases_last=False),
    "the peer's loader is not told": Design(releases_peer=False),
    "one block's warps are not counted": Design(num_arrivals=WARPGROUPS * WARPS),
    "a warp more is counted": Design(num_arrivals=CLUSTER * WARPGROUPS * WARPS + 1),
    "the peer's half is not expected": Design(expects_peers_half=False),
    "one stage, while a product stays in flight": Design(num_stages=1, skew_blocks=0),
    "the skew takes the whole ring": Design(num_stages=2, skew_blocks=2),
    "rows past an expert's last are left": Design(blanks=False),
    "a stage is blanked before its bytes are there": Design(blanks_full_stage=False),
    "warps do not meet after blanking": Design(meets_after_blanking=False),
}
MANY_BLOCKS = weight_gradient([150, 300, 65])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    assert is_seen(partial(explore, MISTAKES[mistake], MANY_BLOCKS), num_seeds=20)


def test_blocks_that_pair_tiles_of_two_experts_are_seen() -> None:
    """Neighbours of a flat list of tiles have unequal depths where experts have unequal rows."""

    class Flat(WeightGradient):
        def num_tile_pairs(self) -> int:
            return len(self.offsets) // CLUSTER

        def tile_at(self, idx: int, rank: int) -> ProductTile:
            expert = CLUSTER * idx + rank
            return replace(WeightGradient.tile_at(self, expert, 0), idx=idx, row=0, column=0)

    counts = [150, 300, 65, 200]
    job = Flat(offsets=ends_of(counts), num_rows=sum(counts), num_columns=8, depth=8, tile=(128, 256))
    with pytest.raises(BrokenError):
        explore(Design(), job, seed=1)


def test_a_stage_released_before_it_is_read_is_seen() -> None:
    """Were a stage released when its product is issued, the next copy would meet its readers."""

    class Hasty(Cluster):
        def read(self, rank: int, group: int, stage: Stage, tile: ProductTile, k_block: int) -> None:
            super().read(rank, group, stage, tile, k_block)
            for target in range(CLUSTER):
                self.blocks[target][self.blocks[rank].index(stage)].empty.arrive()

        def release(self, rank: int, stage: int) -> None:
            self.blocks[rank][stage].readers -= 1

    clusters = [Hasty(Design(num_stages=3), rows_job([128], depth=576), seed) for seed in range(20)]
    with pytest.raises(BrokenError, match=r"overwritten while it is read|one arrival too many"):
        list(map(Cluster.run, clusters))
