"""The sm_90a products with the hardware played on the CPU: where operands land, and what becomes of the sums.

Two programs, kept in build/played until a source changes. sm90_layouts.cu (nvcc) reads what the played copy
engine wrote back through CuTe's layouts. sm90_jobs.cpp (any C++ compiler) runs the kernel's jobs whole in the
host executor, the products played too, and compares them with float64.
"""

from itertools import accumulate
from pathlib import Path

import pytest

from dscoder.testing.played import host_program, layout_program, run
from dscoder.testing.tile_pairs import Job, RowsJob, WeightGradient
from tests.csrc.played_checks import (
    assert_all_agree,
    assert_all_right,
    needs_cxx,
    needs_nvcc,
    planted_swizzle,
)


@pytest.fixture(scope="module")
def layouts() -> Path:
    return layout_program("sm90_layouts.cu")


@pytest.fixture(scope="module")
def jobs() -> Path:
    return host_program("sm90_jobs.cpp")


@needs_nvcc
def test_boxes_land_where_wgmma_reads_them_and_sums_are_where_they_are_stored(layouts: Path) -> None:
    assert_all_agree(layouts, more_than=7_000_000)


@needs_nvcc
def test_a_wrong_swizzle_is_seen(layouts: Path) -> None:
    assert "operand" in planted_swizzle(layouts)


@needs_cxx
def test_every_job_is_right_and_stays_within_its_output(jobs: Path) -> None:
    assert_all_right(jobs, num_cases=21)


@needs_cxx
def test_the_tiles_of_the_pipeline_model_are_those_of_the_kernels(jobs: Path) -> None:
    counts = [1, 0, 130, 17, 0, 64, 65, 129, 200]  # and nine rows of none, as in sm90_jobs.cpp
    offsets, num_rows = tuple(accumulate(counts)), sum(counts) + 9
    made: dict[str, Job] = {
        "rows": RowsJob(
            offsets=offsets, num_rows=num_rows, num_columns=600, depth=152, tile=(128, 256), swaps=False
        ),
        "swapped": RowsJob(
            offsets=offsets, num_rows=num_rows, num_columns=600, depth=152, tile=(32, 128), swaps=True
        ),
        "gradient": WeightGradient(
            offsets=offsets, num_rows=num_rows, num_columns=300, depth=600, tile=(128, 256)
        ),
    }
    wanted = []
    for name, job in made.items():
        for idx in range(job.num_tile_pairs()):
            for rank in range(2):
                tile = job.tile_at(idx, rank)
                place = f"{tile.group} {tile.row} {tile.column} {tile.num_k_blocks} {int(tile.shares_rows)}"
                wanted.append(f"{name} {idx} {rank} {place}")
    assert run(jobs, "tiles").stdout.splitlines() == wanted


@needs_cxx
def test_rows_past_an_expert_that_stay_in_its_weight_gradient_are_seen(jobs: Path) -> None:
    wrong = [line for line in run(jobs, "planted").stdout.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == 4
    assert all(line.startswith("gradient") for line in wrong)
