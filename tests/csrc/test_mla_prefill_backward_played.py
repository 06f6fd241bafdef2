"""The gradients of prefill attention on sm_90a with the hardware played: where things lie, what comes out.

Two programs (dscoder.testing.played). sm90_prefill_backward_layouts.cu reads what the played copy engine
wrote back through CuTe's layouts. sm90_prefill_backward.cpp takes whole plans in the host executor, the
products played too, and compares the gradients with float64.
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

NUM_CASES = 11


@pytest.fixture(scope="module")
def layouts() -> Path:
    return layout_program("sm90_prefill_backward_layouts.cu")


@pytest.fixture(scope="module")
def tiles() -> Path:
    return host_program("sm90_prefill_backward.cpp")


def right(tiles: Path, planted: str) -> set[str]:
    return right_cases(tiles, planted, num_cases=NUM_CASES)


@needs_nvcc
def test_boxes_lie_where_wgmma_reads_them_and_sums_where_they_are_stored(layouts: Path) -> None:
    assert_all_agree(layouts, more_than=250_000)


@needs_nvcc
def test_a_wrong_swizzle_is_seen(layouts: Path) -> None:
    first_moved = "key (4, 0)"  # the first line that the swizzle moves elsewhere
    assert planted_swizzle(layouts).startswith(first_moved)


@needs_cxx
def test_every_gradient_is_right_and_zeros_are_where_no_sequence_is(tiles: Path) -> None:
    assert_all_right(tiles, num_cases=NUM_CASES)


@needs_cxx
def test_queries_behind_a_sequence_that_stay_are_seen(tiles: Path) -> None:
    """Where they are NaN: of a sequence in the middle they are the next one's."""
    assert right(tiles, "queries") == {"a whole block"}


@needs_cxx
def test_keys_behind_a_sequence_that_stay_are_seen(tiles: Path) -> None:
    assert right(tiles, "keys") == {"a whole block", "whole blocks"}


@needs_cxx
def test_scores_that_are_not_hidden_are_seen(tiles: Path) -> None:
    """Behind a sequence's end weights of keys that are zeros do no harm, while they are finite."""
    assert right(tiles, "unhidden") == {"a whole block", "no mask", "shared by three"}


@needs_cxx
def test_a_strip_that_no_warpgroup_multiplies_is_seen(tiles: Path) -> None:
    """Rows 128 wide have no strip that changes hands."""
    assert right(tiles, "strips") == {"128 wide", "heads share keys"}
