"""Which sm_90a kernel a grouped product gets when it is asked for, and that it must be asked for.

The plans are plain functions, in builds with and without kernels.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.runtime.native import _C
from dscoder.testing.examples import FIXED

pytestmark = pytest.mark.skipif(
    bool(_C.cuda_archs) and "90a" not in _C.cuda_archs, reason="this build has kernels, but none for sm_90a"
)
CAPABILITY, NUM_SMS = (9, 0), 132
STATIC_BYTES, BYTES_PER_BLOCK = 5120, 227 * 1024
STEPS = ["forward", "input_gradient", "swiglu", "swiglu_backward", "weight_gradient"]
TILES = {"32x128": 10, "64x128": 8, "64x256": 5, "128x256": 4}  # and the stages of each
SHAPES = [(64, 2816, 2048), (64, 2048, 1408), (64, 1408, 2048), (20, 3072, 5120), (20, 5120, 1536)]


def plan(
    step: str,
    num_rows: int,
    shape: tuple[int, int, int] = SHAPES[0],
    *,
    arch: str = "sm90",
    capability: tuple[int, int] = CAPABILITY,
    num_sms: int = NUM_SMS,
) -> dict[str, Any]:
    found: dict[str, Any] = _C.grouped_gemm_plan(step, num_rows, *shape, capability, num_sms, arch)
    return found


sizes = st.tuples(st.integers(1, 512), st.integers(1, 1024), st.integers(1, 1024)).map(
    lambda s: (s[0], 8 * s[1], 8 * s[2])
)


@settings(FIXED, max_examples=200)
@given(
    step=st.sampled_from(STEPS),
    num_rows=st.integers(1, 2**20),
    shape=sizes,
    num_sms=st.integers(2, 150),
)
def test_every_plan_fits_a_hopper(
    step: str, num_rows: int, shape: tuple[int, int, int], num_sms: int
) -> None:
    found = plan(step, num_rows, shape, num_sms=num_sms)
    rows, columns = map(int, found["tile"].split("x"))
    assert found["arch"] == "sm90"
    assert found["stages"] == TILES[found["tile"]]
    assert found["shared_bytes"] == found["stages"] * (rows + columns) * 128
    assert found["shared_bytes"] + STATIC_BYTES <= BYTES_PER_BLOCK
    assert found["threads"] * found["registers"] <= 65536
    assert found["cluster"] == 2
    assert found["blocks"] % 2 == 0
    assert 2 <= found["blocks"] <= num_sms


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("rows_per_expert", "tile"),
    [(1, "32x128"), (24, "32x128"), (32, "64x128"), (96, "64x256"), (384, "64x256"), (768, "128x256")],
)
@pytest.mark.parametrize("step", ["forward", "swiglu"])
def test_the_tile_follows_the_rows_of_an_expert(
    step: str, rows_per_expert: int, tile: str, shape: tuple[int, int, int]
) -> None:
    assert plan(step, rows_per_expert * shape[0], shape)["tile"] == tile


@pytest.mark.parametrize(
    ("step", "num_rows", "shape", "tile"),
    [
        (
            "forward",
            768,
            (1, 2816, 2048),
            "128x256",
        ),  # 39 pairs of tiles for 66 clusters; 72 would be smaller
        ("forward", 768, (1, 1408, 2048), "64x256"),  # 20, or 37
        ("forward", 384, (1, 1408, 2048), "64x128"),
        ("input_gradient", 768, (1, 1408, 2048), "64x256"),
        ("swiglu", 40, (1, 1408, 2048), "32x128"),
        ("forward", 4096, (1, 2816, 2048), "128x256"),
    ],
)
def test_few_tiles_are_cut_smaller_while_clusters_are_left(
    step: str, num_rows: int, shape: tuple[int, int, int], tile: str
) -> None:
    assert plan(step, num_rows, shape)["tile"] == tile


def test_any_number_of_rows_has_a_tile() -> None:
    assert plan("forward", 2**31 - 1, (1, 64, 64))["tile"] == "128x256"


@pytest.mark.parametrize(
    ("step", "rows_per_expert", "tile"),
    [
        ("input_gradient", 1, "64x256"),
        ("swiglu_backward", 399, "64x256"),
        ("input_gradient", 401, "128x256"),
        ("weight_gradient", 1, "128x256"),
        ("weight_gradient", 4096, "128x256"),
    ],
)
def test_gradients_have_no_tile_for_decoding(step: str, rows_per_expert: int, tile: str) -> None:
    assert plan(step, 64 * rows_per_expert)["tile"] == tile


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("num_rows", [64, 64 * 4096])
def test_what_no_gpu_has_run_is_not_chosen(step: str, num_rows: int) -> None:
    """kSm90IsProven of csrc/gemm/grouped_gemm_plan.h; when it turns, so does this."""
    assert plan(step, num_rows, arch="auto")["arch"] == "sm80"


@pytest.mark.parametrize(
    ("num_rows", "shape"), [(0, (4, 64, 64)), (5, (0, 64, 64)), (5, (4, 0, 64)), (5, (4, 64, 0))]
)
def test_what_has_nothing_to_multiply_is_left_to_the_mma_kernels(
    num_rows: int, shape: tuple[int, int, int]
) -> None:
    assert plan("forward", num_rows, shape)["arch"] == "sm80"


def test_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"^grouped_gemm: arch sm90 needs compute capability 9.0"):
        plan("forward", 8, capability=(8, 0))
