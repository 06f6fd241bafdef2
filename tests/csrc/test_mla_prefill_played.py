"""Prefill attention on sm_90a with the hardware played: where operands land, and what becomes of them.

Two programs (dscoder.testing.played). sm90_prefill_layouts.cu reads what the played copy engine wrote back
through CuTe's layouts. sm90_prefill.cpp takes whole tiles of plans in the host executor, the products played
too, and compares them with float64.
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

NUM_CASES = 12


@pytest.fixture(scope="module")
def layouts() -> Path:
    return layout_program("sm90_prefill_layouts.cu")


@pytest.fixture(scope="module")
def tiles() -> Path:
    return host_program("sm90_prefill.cpp")


def right(tiles: Path, planted: str) -> set[str]:
    return right_cases(tiles, planted, num_cases=NUM_CASES)


@needs_nvcc
def test_boxes_lie_where_wgmma_reads_them_and_sums_where_they_are_stored(layouts: Path) -> None:
    assert_all_agree(layouts, more_than=490_000)


@needs_nvcc
def test_a_wrong_swizzle_is_seen(layouts: Path) -> None:
    first_moved = "query (4, 0)"  # the first line that the swizzle moves elsewhere
    assert planted_swizzle(layouts).startswith(first_moved)


@needs_cxx
def test_every_tile_is_right_and_stays_within_its_rows(tiles: Path) -> None:
    assert_all_right(tiles, num_cases=NUM_CASES)


@needs_cxx
def test_rows_behind_a_sequence_that_stay_in_its_values_are_seen(tiles: Path) -> None:
    """Where they are NaN: of a sequence in the middle they are the next one's."""
    assert right(tiles, "unblanked") == {"a whole block", "a causal block"}


@needs_cxx
def test_scores_that_are_not_hidden_are_seen(tiles: Path) -> None:
    assert right(tiles, "unhidden") == {"a whole block"}


@needs_cxx
def test_sums_that_do_not_follow_their_reference_are_seen(tiles: Path) -> None:
    assert len(right(tiles, "unscaled")) == NUM_CASES - 1
    assert "scores that grow" not in right(tiles, "unscaled")


@needs_cxx
def test_a_row_too_many_is_seen(tiles: Path) -> None:
    """Every case ends with a sequence that does not fill its tile, but for two."""
    assert right(tiles, "overlong") == {"a whole block", "a causal block"}
