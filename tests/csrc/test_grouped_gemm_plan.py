"""Which kernel a grouped product gets: every plan fits its device, and follows the sizes sensibly.

The plans are plain functions, in builds with and without kernels.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.runtime.native import _C
from dscoder.testing.examples import FIXED

A100, A10, RTX_4090, H200 = ((8, 0), 108), ((8, 6), 72), ((8, 9), 128), ((9, 0), 132)
DEVICES = {"A100": A100, "A10": A10, "RTX 4090": RTX_4090, "H200": H200}
SHARED_PER_SM = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228}  # KiB
THREADS_PER_SM = {(8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048}
STEPS = ["forward", "input_gradient", "swiglu", "swiglu_backward", "weight_gradient"]
STATIC_BYTES, SYSTEM_BYTES = 4224, 1024

# (E, columns, depth) of the experts of V2-Lite, and of an eighth of V2's.
SHAPES = [(64, 2816, 2048), (64, 2048, 1408), (64, 1408, 2048), (20, 3072, 5120), (20, 5120, 1536)]


def plan(
    step: str, num_rows: int, shape: tuple[int, int, int], device: tuple[tuple[int, int], int] = A100
) -> dict[str, Any]:
    found: dict[str, Any] = _C.grouped_gemm_plan(step, num_rows, *shape, *device, "sm80")
    return found


def area(tile: str) -> int:
    rows, columns = tile.split("x")
    return int(rows) * int(columns)


sizes = st.tuples(st.integers(0, 512), st.integers(0, 1024), st.integers(0, 1024)).map(
    lambda s: (s[0], 8 * s[1], 8 * s[2])
)


@settings(FIXED, max_examples=300)
@given(
    step=st.sampled_from(STEPS),
    num_rows=st.integers(0, 2**21),
    shape=sizes,
    device=st.sampled_from(list(DEVICES.values())),
)
def test_every_plan_fits_its_device(
    step: str, num_rows: int, shape: tuple[int, int, int], device: tuple[tuple[int, int], int]
) -> None:
    found = plan(step, num_rows, shape, device)
    shared = SHARED_PER_SM[device[0]] * 1024
    block = found["shared_bytes"] + STATIC_BYTES + SYSTEM_BYTES
    resident = found["blocks_per_sm"]
    assert resident >= 1
    assert resident * block <= shared
    assert resident * found["threads"] * found["registers"] <= 65536
    assert resident * found["threads"] <= THREADS_PER_SM[device[0]]
    rows, columns = map(int, found["tile"].split("x"))
    assert found["shared_bytes"] == found["stages"] * (rows + columns) * 128
    assert rows * columns * 2 <= found["shared_bytes"] // found["stages"] * (found["stages"] - 1)
    assert 0 <= found["blocks"] <= resident * device[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", ["forward", "swiglu"])
@pytest.mark.parametrize("rows_per_expert", [1, 4, 8])
def test_decoding_gets_the_tile_of_16_rows(
    step: str, shape: tuple[int, int, int], rows_per_expert: int, device: str
) -> None:
    found = plan(step, rows_per_expert * shape[0], shape, DEVICES[device])
    assert found["tile"] == "16x128"


@pytest.mark.parametrize("step", STEPS[1:4:2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_few_rows_get_the_tile_of_64(step: str, shape: tuple[int, int, int]) -> None:
    assert plan(step, 8 * shape[0], shape)["tile"] == "64x128"


@pytest.mark.parametrize("device", [A100, H200])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_many_rows_get_the_largest_tile(
    step: str, shape: tuple[int, int, int], device: tuple[tuple[int, int], int]
) -> None:
    assert plan(step, 768 * shape[0], shape, device)["tile"] == "128x256"


@pytest.mark.parametrize("device", [A10, RTX_4090])
@pytest.mark.parametrize("step", STEPS)
def test_a_device_of_little_shared_memory_gets_a_tile_that_fits(
    step: str, device: tuple[tuple[int, int], int]
) -> None:
    assert plan(step, 768 * 64, SHAPES[0], device)["tile"] == "64x128"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_more_rows_never_get_a_smaller_tile(step: str, shape: tuple[int, int, int], device: str) -> None:
    rows = [*range(0, 70 * shape[0], 16), *(2**n for n in range(13, 21))]
    areas = [area(plan(step, num_rows, shape, DEVICES[device])["tile"]) for num_rows in rows]
    assert areas == sorted(areas)


@pytest.mark.parametrize("step", STEPS)
def test_nothing_to_do_takes_no_block(step: str) -> None:
    no_rows = plan(step, 0, (4, 64, 64))["blocks"]
    # Without rows a weight gradient still writes zeros.
    assert no_rows == (4 if step == "weight_gradient" else 0)
    assert plan(step, 5, (4, 0, 64))["blocks"] == 0


def test_rows_without_experts_are_zeroed_by_somebody() -> None:
    assert plan("forward", 5, (0, 64, 64))["blocks"] > 0
    assert plan("weight_gradient", 5, (0, 64, 64))["blocks"] == 0


def test_a_call_has_no_more_blocks_than_tiles() -> None:
    found = plan("forward", 3, (64, 256, 2048))
    assert found["tile"] == "16x128"
    assert found["blocks"] == 3 * 2  # three experts at the most, two column tiles


def test_persistent_blocks_fill_the_device() -> None:
    found = plan("forward", 6 * 8192, SHAPES[0])
    assert (found["blocks"], found["cluster"], found["arch"]) == (108, 1, "sm80")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": "backward"}, "step must be forward, .* got backward"),
        ({"arch": "sm70"}, "arch must be auto, sm80 or sm90, got sm70"),
        ({"capability": (7, 5)}, "there are kernels for compute capability 8.x and 9.0, got 7.5"),
        ({"num_sms": 0}, "num_sms must be > 0, got 0"),
        ({"num_rows": -1}, "sizes must be >= 0, got -1 rows"),
        ({"num_rows": 2**31}, "num_rows must fit an int32, got 2147483648"),
    ],
)
def test_a_wrong_argument_is_named(fields: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        **{"step": "forward", "num_rows": 8, "num_experts": 4, "num_columns": 64, "depth": 64},
        **{"capability": (8, 0), "num_sms": 108, "arch": "sm80"},
    }
    with pytest.raises(ValueError, match=f"grouped_gemm.*: {message}"):
        _C.grouped_gemm_plan(**{**arguments, **fields})
