"""Latent decoding on sm_90a with the hardware played: where operands land, and what becomes of them.

Two programs (dscoder.testing.played). sm90_decode_layouts.cu reads what the played copy engine wrote, and the
weights, back through CuTe's layouts. sm90_decode.cpp runs pieces of a plan whole in the host executor, the
products played too, and compares what the parts add up to with float64.
"""

from pathlib import Path

import pytest

from dscoder.testing.played import host_program, layout_program
from tests.csrc.played_checks import (
    assert_all_agree,
    assert_all_right,
    needs_cxx,
    needs_nvcc,
    planted_swizzle,
    right_cases,
)

NUM_CASES = 14


@pytest.fixture(scope="module")
def layouts() -> Path:
    return layout_program("sm90_decode_layouts.cu")


@pytest.fixture(scope="module")
def pieces() -> Path:
    return host_program("sm90_decode.cpp")


def right(pieces: Path, planted: str) -> set[str]:
    return right_cases(pieces, planted, num_cases=NUM_CASES)


@needs_nvcc
def test_boxes_and_weights_lie_where_wgmma_reads_them_and_sums_where_they_are_stored(layouts: Path) -> None:
    assert_all_agree(layouts, more_than=600_000)


@needs_nvcc
def test_a_wrong_swizzle_is_seen(layouts: Path) -> None:
    first_moved = "query (4, 0)"  # the first line that the swizzle moves elsewhere
    assert planted_swizzle(layouts).startswith(first_moved)


@needs_cxx
def test_every_piece_is_right_and_stays_within_its_output(pieces: Path) -> None:
    assert_all_right(pieces, num_cases=NUM_CASES)


@needs_cxx
def test_rows_behind_a_sequence_that_stay_in_its_values_are_seen(pieces: Path) -> None:
    assert right(pieces, "unblanked") == {"a block"}  # whose sequence ends with it


@needs_cxx
def test_maxima_of_the_other_warpgroup_that_are_not_followed_are_seen(pieces: Path) -> None:
    assert right(pieces, "unfollowed") == {"one row", "a block"}  # of one block


@needs_cxx
def test_values_of_another_block_are_seen(pieces: Path) -> None:
    assert right(pieces, "late") == set()
