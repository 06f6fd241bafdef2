"""The instructions of sm_80 on the host executor: fragments where the PTX manual draws them, copies that
land no sooner than they must."""

from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

SEEDS = range(12)


@pytest.fixture(params=SEEDS)
def kernels(host_kernels: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    host_kernels.set_order(request.param)
    return host_kernels


# ---- ldmatrix ----


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_lane_gets_two_neighbours_of_a_row_or_of_a_column(kernels: ModuleType, is_transposed: bool) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    registers = kernels.load_matrices(matrices, is_transposed).reshape(32, 4)
    seen = matrices.transpose(0, 2, 1) if is_transposed else matrices
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for i in range(4):
            low, high = int(seen[i, row, column]), int(seen[i, row, column + 1])
            assert registers[lane, i] == low | high << 16


# ---- mma ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_fragments_is_that_of_the_matrices(kernels: ModuleType, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(3)
    a, b = (torch.randn(16, n, generator=rng).to(dtype) for n in (16, 8))
    acc = torch.randn(16, 8, generator=rng)
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    got = kernels.multiply_add(*bits, acc.numpy(), dtype == torch.bfloat16)
    wanted = acc.double() + a.double() @ b.double()
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_element_of_a_product_comes_from_its_row_and_column(
    host_kernels: ModuleType, dtype: torch.dtype
) -> None:
    ones = torch.eye(16, 8).to(dtype)
    a = torch.arange(256).reshape(16, 16).to(dtype)
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, ones)]
    got = host_kernels.multiply_add(*bits, np.zeros((16, 8), dtype=np.float32), dtype == torch.bfloat16)
    np.testing.assert_array_equal(got, a[:, :8].float().numpy())


# ---- cp.async ----

NUM_THREADS = 64


@pytest.fixture
def x() -> NDArray[np.float32]:
    return np.arange(8 * NUM_THREADS, dtype=np.float32)


def halves(y: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What came of the older group, and of the newer."""
    return y[: 4 * NUM_THREADS], y[4 * NUM_THREADS :]


def test_copies_are_there_after_their_wait(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(kernels.copies(x, kernels.Copying.WAITED), x)


def test_a_copy_read_before_its_wait_is_nan(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    assert np.isnan(kernels.copies(x, kernels.Copying.UNWAITED)).all()


def test_a_wait_that_leaves_one_group_lands_the_older(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    older, newer = halves(kernels.copies(x, kernels.Copying.OLDEST_WAITED))
    np.testing.assert_array_equal(older, halves(x)[0])
    assert np.isnan(newer).all()


def test_copies_of_no_group_do_not_land(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    older, newer = halves(kernels.copies(x, kernels.Copying.UNCOMMITTED))
    np.testing.assert_array_equal(older, halves(x)[0])
    assert np.isnan(newer).all()


def test_an_invalid_source_gives_zeros(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    older, newer = halves(kernels.copies(x, kernels.Copying.ZERO_FILL))
    np.testing.assert_array_equal(older, halves(x)[0])
    assert (newer == 0).all()


def reversed_by_thread(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x.reshape(2, NUM_THREADS, 4)[:, ::-1].reshape(-1)


def test_a_barrier_shows_copies_to_other_threads(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(kernels.copies(x, kernels.Copying.NEIGHBOUR), reversed_by_thread(x))


def test_without_a_barrier_copies_of_other_threads_are_missing(
    host_kernels: ModuleType, x: NDArray[np.float32]
) -> None:
    num_missing = 0
    for seed in SEEDS:
        host_kernels.set_order(seed)
        num_missing += bool(np.isnan(host_kernels.copies(x, host_kernels.Copying.NEIGHBOUR_UNSYNCED)).any())
    assert num_missing == len(SEEDS)


def test_a_misaligned_copy_is_an_error(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    wanted = r"thread .*cp\.async: an address off its 16 bytes at .*ptx_kernels.cu:\d+ in .*copies_kernel"
    with pytest.raises(RuntimeError, match=wanted):
        kernels.copies(x, kernels.Copying.MISALIGNED)
    np.testing.assert_array_equal(kernels.copies(x, kernels.Copying.WAITED), x)  # the executor goes on


def test_a_copy_into_global_memory_is_an_error(kernels: ModuleType, x: NDArray[np.float32]) -> None:
    with pytest.raises(RuntimeError, match=r"cp\.async: the target is not in the block's shared memory"):
        kernels.copies(x, kernels.Copying.INTO_GLOBAL)
