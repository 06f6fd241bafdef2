"""How latent decoding is dealt out: every block has one owner, whatever the lengths, and parts are even.

The rule is plain functions, in builds with and without kernels; the kernel that follows it on a device runs
on the host executor and gives the same bits.
"""

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.runtime.native import _C
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded

BLOCK, SEQUENCE_COST, FEWEST_BLOCKS = 64, 2, 2
MOST_ROWS = 64 * 1024
Plan = list[tuple[int, int]]
Piece = tuple[int, int, int, int]  # part, sequence, first block, end

lengths = st.lists(
    st.one_of(
        *(st.integers(0, 200), st.integers(0, 5000), st.integers(0, MOST_ROWS)),
        st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, -1, -(2**31), 2**31 - 1]),
    ),
    max_size=24,
)
part_counts = st.one_of(st.integers(1, 12), st.sampled_from([66, 108, 132]))


def num_blocks(length: int) -> int:
    return -(-min(max(length, 0), MOST_ROWS) // BLOCK)


def pieces_of(plan: Plan, lengths: list[int], num_parts: int) -> list[Piece]:
    """What each part owns of each sequence: all from its position up to the next part's."""
    pieces = []
    for part, (begin, end) in enumerate(pairwise(plan[: num_parts + 1])):
        for b in range(begin[0], min(end[0] + 1, len(lengths))):
            if (b, 0) >= end:
                continue
            first = begin[1] if b == begin[0] else 0
            last = min(end[1], num_blocks(lengths[b])) if b == end[0] else num_blocks(lengths[b])
            pieces.append((part, b, first, max(first, last)))
    return pieces


def assert_covers_once(pieces: list[Piece], lengths: list[int]) -> None:
    for b, length in enumerate(lengths):
        own = [k for _, sequence, first, end in pieces if sequence == b for k in range(first, end)]
        assert own == list(range(num_blocks(length))), f"sequence {b}"


def plan_of(lengths: list[int], num_parts: int) -> Plan:
    return _C.mla_decode_plan_of(lengths, num_parts, MOST_ROWS)


# ---- the rule ----


@settings(FIXED, max_examples=300)
@given(lengths=lengths, num_parts=part_counts)
def test_every_block_of_every_sequence_has_one_owner(lengths: list[int], num_parts: int) -> None:
    plan = plan_of(lengths, num_parts)
    assert len(plan) == num_parts + 1 + len(lengths)
    assert plan[0] == (0, 0)
    assert plan[num_parts] == (len(lengths), 0)
    assert plan[: num_parts + 1] == sorted(plan[: num_parts + 1])
    assert_covers_once(pieces_of(plan, lengths, num_parts), lengths)


@settings(FIXED, max_examples=300)
@given(planned=lengths, data=st.data(), num_parts=part_counts)
def test_a_plan_made_for_other_lengths_covers_every_block_too(
    planned: list[int], data: st.DataObject, num_parts: int
) -> None:
    length = st.integers(0, MOST_ROWS)
    actual = data.draw(st.lists(length, min_size=len(planned), max_size=len(planned)))
    plan = plan_of(planned, num_parts)
    assert_covers_once(pieces_of(plan, actual, num_parts), actual)


@settings(FIXED, max_examples=300)
@given(lengths=lengths, num_parts=part_counts)
def test_the_owners_of_a_sequence_are_those_that_have_pieces_of_it(
    lengths: list[int], num_parts: int
) -> None:
    plan = plan_of(lengths, num_parts)
    pieces = pieces_of(plan, lengths, num_parts)
    for b, (first, last) in enumerate(plan[num_parts + 1 :]):
        owners = [part for part, sequence, begin, end in pieces if sequence == b and begin < end]
        if owners:
            assert (first, last) == (owners[0], owners[-1])
        else:
            assert num_blocks(lengths[b]) == 0
            assert first == last
            assert first in [part for part, sequence, *_ in pieces if sequence == b]


@settings(FIXED, max_examples=300)
@given(lengths=lengths, num_parts=part_counts)
def test_no_two_pieces_of_shared_sequences_have_one_slot(lengths: list[int], num_parts: int) -> None:
    plan = plan_of(lengths, num_parts)
    owners = plan[num_parts + 1 :]
    shared = [
        piece for piece in pieces_of(plan, lengths, num_parts) if owners[piece[1]][0] < owners[piece[1]][1]
    ]
    slots = [2 * part + (begin == 0) for part, _, begin, end in shared if begin < end]
    assert len(slots) == len(set(slots))


@settings(FIXED, max_examples=300)
@given(lengths=lengths, num_parts=part_counts)
def test_no_piece_of_a_shared_sequence_is_below_the_fewest_blocks(lengths: list[int], num_parts: int) -> None:
    plan = plan_of(lengths, num_parts)
    owners = plan[num_parts + 1 :]
    for _, b, begin, end in pieces_of(plan, lengths, num_parts):
        if begin < end and owners[b][0] < owners[b][1]:
            assert end - begin >= FEWEST_BLOCKS


@settings(FIXED, max_examples=300)
@given(lengths=lengths, num_parts=part_counts)
def test_no_part_costs_much_more_than_its_share(lengths: list[int], num_parts: int) -> None:
    """A part's share, and what its ends may move: each to a multiple, or to the next sequence."""
    pieces = pieces_of(plan_of(lengths, num_parts), lengths, num_parts)
    num_units = sum(SEQUENCE_COST + num_blocks(length) for length in lengths)
    for part in range(num_parts):
        cost = sum(
            end
            - begin
            + (SEQUENCE_COST if begin == 0 and (begin < end or num_blocks(lengths[b]) == 0) else 0)
            for owner, b, begin, end in pieces
            if owner == part
        )
        assert cost <= -(-num_units // num_parts) + 2 * (FEWEST_BLOCKS - 1) + SEQUENCE_COST


@pytest.mark.parametrize(
    ("num_sequences", "length", "most_blocks"),
    [(1, 1024, 2), (1, 32768, 4), (16, 1024, 4), (16, 4096, 8), (128, 4096, 64), (256, 1024, 32)],
)
def test_parts_of_sequences_of_one_length_are_even(num_sequences: int, length: int, most_blocks: int) -> None:
    """On 132 SMs; the share of each is 0.1, 3.9, 1.9, 7.8, 62.1 and 31.0 blocks."""
    same = [length] * num_sequences
    pieces = pieces_of(plan_of(same, 132), same, 132)
    owned = [sum(end - begin for owner, _, begin, end in pieces if owner == part) for part in range(132)]
    assert max(owned) == most_blocks


def test_one_part_owns_everything() -> None:
    assert plan_of([100, 0, 5000], 1) == [(0, 0), (3, 0), (0, 0), (0, 0), (0, 0)]


def test_no_sequences_leave_nothing_to_own() -> None:
    assert plan_of([], 3) == [(0, 0)] * 4


@pytest.mark.parametrize(
    ("num_new", "num_heads", "num_sms", "wanted"),
    [(1, 16, 132, 132), (1, 64, 132, 132), (1, 65, 132, 66), (1, 128, 132, 66), (4, 128, 132, 16),
     (1, 128, 1, 1), (300, 128, 132, 1)],
)  # fmt: skip
def test_parts_fill_the_device_once(num_new: int, num_heads: int, num_sms: int, wanted: int) -> None:
    assert _C.mla_decode_num_parts(num_new, num_heads, num_sms) == wanted


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match="mla_decode_num_parts: num_new and num_heads must be positive, got 0"
    ):
        _C.mla_decode_num_parts(0, 16, 132)
    with pytest.raises(ValueError, match="must fit an int32, got 65536 and 65536"):
        _C.mla_decode_num_parts(2**16, 2**16, 132)
    with pytest.raises(ValueError, match="num_parts must be positive, got 0"):
        _C.mla_decode_plan_of([1], 0, MOST_ROWS)
    with pytest.raises(ValueError, match="max_rows must be >= 0, got -1"):
        _C.mla_decode_plan_of([1], 1, -1)


# ---- the resources of the kernel of sm_80 ----

SHARED = {"A100": 163 * 1024, "A10": 99 * 1024, "H200": 227 * 1024}


@pytest.mark.parametrize(
    ("device", "num_rows", "rows", "stages"),
    [
        *(("A100", 16, 16, 3), ("A100", 17, 32, 3), ("A100", 64, 64, 2), ("A100", 128, 64, 2)),
        *(
            ("H200", 1, 16, 5),
            ("H200", 32, 32, 4),
            ("H200", 33, 64, 3),
            ("A10", 16, 16, 2),
            ("A10", 128, 16, 2),
        ),
    ],
)
def test_a_tile_takes_the_rows_it_needs_and_stages_that_fit(
    device: str, num_rows: int, rows: int, stages: int
) -> None:
    plan = _C.mla_decode_sm80_plan(1, num_rows, SHARED[device])
    assert (plan["rows"], plan["stages"]) == (rows, stages)
    assert plan["tiles"] == -(-num_rows // rows)
    assert plan["shared_bytes"] <= SHARED[device]


def test_a_device_without_room_for_a_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes of shared memory, the device has 65536"):
        _C.mla_decode_sm80_plan(1, 16, 65536)


# ---- the plan kernel ----


@settings(FIXED, max_examples=60)
@given(lengths=lengths, num_parts=part_counts, order=st.integers(0, 100))
def test_the_kernel_makes_the_same_plan(
    host_ops: ModuleType, host_kernels: ModuleType, lengths: list[int], num_parts: int, order: int
) -> None:
    host_kernels.set_order(order)
    plan, memory = guarded(num_parts + 1 + len(lengths), 2, dtype=torch.int32)
    host_ops.mla_decode_plan(torch.tensor(lengths, dtype=torch.int32), plan, MOST_ROWS)
    assert_guards_whole(memory)
    assert [tuple(row) for row in plan.tolist()] == plan_of(lengths, num_parts)


@pytest.mark.parametrize("num_sequences", [255, 256, 257, 600])
def test_the_kernel_takes_sequences_in_chunks(host_ops: ModuleType, num_sequences: int) -> None:
    rng = torch.Generator().manual_seed(num_sequences)
    lengths = torch.randint(0, 3000, (num_sequences,), generator=rng, dtype=torch.int32)
    plan = torch.full((300 + 1 + num_sequences, 2), WILD, dtype=torch.int32)
    host_ops.mla_decode_plan(lengths, plan, MOST_ROWS)
    assert [tuple(row) for row in plan.tolist()] == plan_of(lengths.tolist(), 300)


def test_a_plan_without_room_for_a_part_is_refused(host_ops: ModuleType) -> None:
    with pytest.raises(ValueError, match="plan must have more than 1 \\+ 3 rows, got 4"):
        host_ops.mla_decode_plan(
            torch.zeros(3, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32), MOST_ROWS
        )
