"""How prefill attention is dealt out: every row has one tile, whatever cu_seqlens hold, the longest first.

The rule is plain functions, in builds with and without kernels; the kernel that follows it on a device runs
on the host executor and gives the same bits.
"""

from collections import Counter
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.runtime.native import _C
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded

Tile = tuple[int, int]
Lengths = list[tuple[int, int]]  # of each sequence, in queries and in keys
INT32_MAX = 2**31 - 1

length = st.one_of(st.just(0), st.integers(1, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 4096]))
lengths = st.lists(st.tuples(length, length), max_size=12)
tilings = st.fixed_dictionaries(
    {
        "side": st.sampled_from(["queries", "keys"]),
        "tile_rows": st.sampled_from([64, 96, 128, 256]),
        "block_rows": st.sampled_from([32, 64, 96, 128]),
        "causal": st.booleans(),
    }
)
wild = st.one_of(st.integers(-5, 700), st.sampled_from([-(2**31), INT32_MAX, -1, 0, 500]))


def cu_of(lengths: list[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def plan_of(lengths: Lengths, **tiling: Any) -> list[Tile]:
    cu_q, cu_k = cu_of([q for q, _ in lengths]), cu_of([k for _, k in lengths])
    plan: list[Tile] = _C.mla_prefill_plan_of(cu_q, cu_k, cu_q[-1], cu_k[-1], **tiling)
    return plan


def cost_of(tile: Tile, lengths: Lengths, tiling: dict[str, Any]) -> int:
    """Blocks of the other side with a row that the tile's rows see, or are seen by; pair by pair."""
    (b, j), tile_rows, block_rows = tile, tiling["tile_rows"], tiling["block_rows"]
    num_q, num_k = lengths[b]
    by_queries = tiling["side"] == "queries"
    rows = range(j * tile_rows, min((j + 1) * tile_rows, num_q if by_queries else num_k))
    if not tiling["causal"]:
        return -(-(num_k if by_queries else num_q) // block_rows)
    if by_queries:
        return -(-max(num_k - num_q + rows[-1] + 1, 0) // block_rows)
    seeing = [i for i in range(num_q) if rows[0] <= num_k - num_q + i]
    return (
        -(-num_q // block_rows) - seeing[0] // block_rows if seeing else 0 if num_q % block_rows == 0 else 1
    )


# ---- the rule ----


@settings(FIXED, max_examples=300)
@given(lengths=lengths, tiling=tilings)
def test_every_row_of_every_sequence_has_one_tile(lengths: Lengths, tiling: dict[str, Any]) -> None:
    plan = plan_of(lengths, **tiling)
    tile_rows = tiling["tile_rows"]
    own = [pair[0] if tiling["side"] == "queries" else pair[1] for pair in lengths]
    wanted = [(b, j) for b, rows in enumerate(own) for j in range(-(-rows // tile_rows))]
    assert sorted(plan) == wanted
    assert len(plan) <= -(-sum(own) // tile_rows) + len(lengths)


@settings(FIXED, max_examples=200)
@given(lengths=lengths, tiling=tilings)
def test_the_most_work_comes_first_and_ties_keep_their_order(
    lengths: Lengths, tiling: dict[str, Any]
) -> None:
    plan = plan_of(lengths, **tiling)
    keys = [(-cost_of(tile, lengths, tiling), tile) for tile in plan]
    assert keys == sorted(keys)


@pytest.mark.parametrize("octave", range(8, 24))
def test_classes_ascend_in_steps_of_a_sixteenth(octave: int) -> None:
    first = 1 << octave
    starts = [_C.mla_prefill_class(first + first // 16 * i) for i in range(17)]
    assert all(b - a == 1 for a, b in pairwise(starts[: 16 if octave == 23 else 17]))
    assert _C.mla_prefill_class(first + first // 16 - 1) == starts[0]
    assert _C.mla_prefill_class(first - 1) < starts[0]


def test_classes_are_exact_below_256_and_end_at_511() -> None:
    assert [_C.mla_prefill_class(cost) for cost in range(257)] == list(range(257))
    assert _C.mla_prefill_class(2**24 - 1) == _C.mla_prefill_class(INT32_MAX) == 511


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_the_longest_sequence_that_int32_can_tell_overflows_nothing(side: str, causal: bool) -> None:
    """In tiles so large that the plan is short."""
    tiling: dict[str, Any] = {"side": side, "tile_rows": 2**28, "block_rows": 1024, "causal": causal}
    ascending = [(0, j) for j in range(8)]
    by_queries, by_causal_queries = side == "queries", side == "queries" and causal
    assert plan_of([(INT32_MAX, INT32_MAX)], **tiling) == ascending[:: -1 if by_causal_queries else 1]
    # The last query alone sees the one key, and the one query all keys.
    first_last = [ascending[-1], *ascending[:-1]]
    one_key = first_last if by_causal_queries else ascending if by_queries else [(0, 0)]
    assert plan_of([(INT32_MAX, 1)], **tiling) == one_key
    assert plan_of([(1, INT32_MAX)], **tiling) == ([(0, 0)] if by_queries else ascending)


def test_no_sequences_have_no_tiles() -> None:
    assert plan_of([], side="queries", tile_rows=64, block_rows=64, causal=True) == []


def test_thousands_of_sequences_are_taken() -> None:
    plan = plan_of([(1, 1)] * 5000, side="queries", tile_rows=128, block_rows=32, causal=True)
    assert plan == [(b, 0) for b in range(5000)]


@settings(FIXED, max_examples=200)
@given(ends=st.lists(st.tuples(wild, wild), min_size=1, max_size=9), tiling=tilings)
def test_wild_ends_stay_within_rows_and_tiles(ends: list[Tile], tiling: dict[str, Any]) -> None:
    num_q, num_k = 500, 300
    plan = _C.mla_prefill_plan_of([q for q, _ in ends], [k for _, k in ends], num_q, num_k, **tiling)
    by_queries = tiling["side"] == "queries"
    tile_rows, rows = tiling["tile_rows"], num_q if by_queries else num_k
    assert len(plan) <= -(-rows // tile_rows) + len(ends) - 1
    for b, j in plan:
        begin = min(max(ends[b][0 if by_queries else 1], 0), rows)
        end = min(max(ends[b + 1][0 if by_queries else 1], begin), rows)
        assert 0 <= j * tile_rows < end - begin


def test_the_size_of_a_plan_is_that_of_the_smallest_tiles() -> None:
    assert _C.mla_prefill_plan_size(1000, 3) == 2 * (1 + 16 + 3) + 3
    assert _C.mla_prefill_plan_size(INT32_MAX, INT32_MAX) == 2 * (1 + 2**25 + INT32_MAX) + INT32_MAX


@settings(FIXED, max_examples=100)
@given(num_tiles=st.integers(0, 20), num_heads=st.integers(1, 50))
def test_every_head_of_every_tile_is_one_block_of_the_grid(num_tiles: int, num_heads: int) -> None:
    works = _C.mla_prefill_works(num_tiles, num_heads)
    assert Counter(works) == Counter((t, h) for t in range(num_tiles) for h in range(num_heads))
    for (tile, head), (next_tile, next_head) in pairwise(works):  # tiles ascend while the heads' group stays
        assert (head // 16, tile, head) < (next_head // 16, next_tile, next_head)


def test_wrong_arguments_are_named() -> None:
    tiling: dict[str, Any] = {"side": "queries", "tile_rows": 64, "block_rows": 64, "causal": True}
    with pytest.raises(ValueError, match="side must be queries or keys, got rows"):
        _C.mla_prefill_plan_of([0], [0], 0, 0, **tiling | {"side": "rows"})
    with pytest.raises(ValueError, match="tile_rows must be >= 64 and block_rows > 0, got 32 and 64"):
        _C.mla_prefill_plan_of([0], [0], 0, 0, **tiling | {"tile_rows": 32})
    with pytest.raises(ValueError, match="must have as many elements, and one at the least, got 1 and 2"):
        _C.mla_prefill_plan_of([0], [0, 1], 0, 0, **tiling)


# ---- the plan kernel ----


def kernel_plan(
    host_ops: ModuleType, ends: tuple[list[int], list[int]], rows: tuple[int, int], tiling: dict[str, Any]
) -> list[Tile]:
    num_rows = rows[0] if tiling["side"] == "queries" else rows[1]
    num_sequences = len(ends[0]) - 1
    most = -(-num_rows // tiling["tile_rows"]) + num_sequences
    pairs, memory = guarded(-(-(2 * (1 + most) + num_sequences) // 2), 2, dtype=torch.int32)
    plan = pairs.view(-1)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ends)
    host_ops.mla_prefill_plan(cu_q, cu_k, plan, *rows, **tiling)
    assert_guards_whole(memory)
    num_tiles, zero = plan[:2].tolist()
    assert zero == 0
    return [(b, j) for b, j in plan[2 : 2 + 2 * num_tiles].view(-1, 2).tolist()]


@settings(FIXED, max_examples=60)
@given(lengths=lengths, tiling=tilings, order=st.integers(0, 100))
def test_the_kernel_makes_the_same_plan(
    host_ops: ModuleType, host_kernels: ModuleType, lengths: Lengths, tiling: dict[str, Any], order: int
) -> None:
    host_kernels.set_order(order)
    cu_q, cu_k = cu_of([q for q, _ in lengths]), cu_of([k for _, k in lengths])
    seen = kernel_plan(host_ops, (cu_q, cu_k), (cu_q[-1], cu_k[-1]), tiling)
    assert seen == plan_of(lengths, **tiling)


@settings(FIXED, max_examples=60)
@given(ends=st.lists(st.tuples(wild, wild), min_size=1, max_size=9), tiling=tilings)
def test_the_kernel_makes_the_same_plan_of_wild_ends(
    host_ops: ModuleType, ends: list[Tile], tiling: dict[str, Any]
) -> None:
    cu_q, cu_k = [q for q, _ in ends], [k for _, k in ends]
    wanted = _C.mla_prefill_plan_of(cu_q, cu_k, 500, 300, **tiling)
    assert kernel_plan(host_ops, (cu_q, cu_k), (500, 300), tiling) == wanted


@pytest.mark.parametrize("num_sequences", [511, 512, 513, 3000])
def test_the_kernel_takes_sequences_in_chunks(host_ops: ModuleType, num_sequences: int) -> None:
    rng = torch.Generator().manual_seed(num_sequences)
    drawn = torch.randint(0, 700, (num_sequences, 2), generator=rng).tolist()
    lengths = [(q, k) for q, k in drawn]
    tiling: dict[str, Any] = {"side": "queries", "tile_rows": 64, "block_rows": 32, "causal": True}
    cu_q, cu_k = cu_of([q for q, _ in lengths]), cu_of([k for _, k in lengths])
    seen = kernel_plan(host_ops, (cu_q, cu_k), (cu_q[-1], cu_k[-1]), tiling)
    assert seen == plan_of(lengths, **tiling)


def test_a_plan_without_room_is_refused(host_ops: ModuleType) -> None:
    cu = torch.tensor([0, 100], dtype=torch.int32)
    plan = torch.full((8,), WILD, dtype=torch.int32)
    with pytest.raises(ValueError, match="plan must have at least 9 elements, got 8"):
        host_ops.mla_prefill_plan(cu, cu, plan, 100, 100, "queries", 64, 64, True)
