"""Latent decoding on sm_90a with the hardware played: where operands land, and what becomes of them.

Two programs (dscoder.testing.played). sm90_decode_layouts.cu reads what the played copy engine wrote, and the
weights, back through CuTe's layouts. sm90_decode.cpp runs pieces of a plan whole in the host executor, the
products played too, and compares what the parts add up to with float64.
"""

from pathlib import Path

import pytest

from dscoder.testing.played import CXX, NVCC, host_program, layout_program, run

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: the layouts are not compiled")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler: the pieces are not compiled")
NUM_CASES = 14


@pytest.fixture(scope="module")
def layouts() -> Path:
    return layout_program("sm90_decode_layouts.cu")


@pytest.fixture(scope="module")
def pieces() -> Path:
    return host_program("sm90_decode.cpp")


def verdicts(pieces: Path, *planted: str) -> dict[str, str]:
    """right or WRONG for each case, whose name comes first on its line."""
    lines = run(pieces, *planted).stdout.splitlines()
    return {line[:24].strip(): line.split()[-1] for line in lines}


@needs_nvcc
def test_boxes_and_weights_lie_where_wgmma_reads_them_and_sums_where_they_are_stored(layouts: Path) -> None:
    done = run(layouts)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 600_000
    assert done.stdout.endswith(" compared, 0 wrong\n")


@needs_nvcc
def test_a_wrong_swizzle_is_seen(layouts: Path) -> None:
    done = run(layouts, "planted")
    assert done.returncode == 1
    assert done.stdout.startswith("query (4, 0)")  # the first line that the swizzle moves elsewhere


@needs_cxx
def test_every_piece_is_right_and_stays_within_its_output(pieces: Path) -> None:
    done = run(pieces)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(verdicts(pieces).values()) == ["right"] * NUM_CASES


@needs_cxx
def test_rows_behind_a_sequence_that_stay_in_its_values_are_seen(pieces: Path) -> None:
    right = {name for name, verdict in verdicts(pieces, "unblanked").items() if verdict == "right"}
    assert right == {"a block"}  # whose sequence ends with it


@needs_cxx
def test_maxima_of_the_other_warpgroup_that_are_not_followed_are_seen(pieces: Path) -> None:
    right = {name for name, verdict in verdicts(pieces, "unfollowed").items() if verdict == "right"}
    assert right == {"one row", "a block"}  # of one block


@needs_cxx
def test_values_of_another_block_are_seen(pieces: Path) -> None:
    assert set(verdicts(pieces, "late").values()) == {"WRONG"}
