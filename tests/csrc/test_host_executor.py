"""The host executor gives right kernels the results CUDA defines, in every order of threads and blocks."""

from types import ModuleType

import numpy as np
import pytest
import torch

SEEDS = range(12)
ALL = 0xFFFFFFFF


@pytest.fixture(params=SEEDS)
def kernels(host_kernels: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    host_kernels.set_order(request.param)
    return host_kernels


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---- blocks ----


@pytest.mark.parametrize("num_values", [1, 255, 4099])
def test_a_sum_by_shuffles_and_shared_memory(kernels: ModuleType, num_values: int) -> None:
    x = np.arange(num_values, dtype=np.float32) % 64
    assert kernels.block_sum(x, 5) == x.sum()


@pytest.mark.parametrize("shape", [(1, 1), (31, 97), (64, 33)])
def test_a_transpose_through_a_shared_tile(
    kernels: ModuleType, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    x = rng.random(shape, dtype=np.float32)
    np.testing.assert_array_equal(kernels.transpose(x), x.T)


def test_a_histogram_by_atomics_in_dynamic_shared_memory(
    kernels: ModuleType, rng: np.random.Generator
) -> None:
    x = rng.integers(0, 37, 5000, dtype=np.int32)
    np.testing.assert_array_equal(kernels.histogram(x, 37), np.bincount(x, minlength=37))


@pytest.mark.parametrize("num_true", [0, 1, 69, 70])
def test_barriers_count_and_vote(kernels: ModuleType, num_true: int) -> None:
    x = (np.arange(70) < num_true).astype(np.int32)
    wanted = num_true * 4 + 2 * (num_true == 70) + (num_true > 0)
    assert kernels.votes(x).tolist() == [wanted] * 70


def test_every_thread_of_every_block_runs_once(kernels: ModuleType) -> None:
    assert (kernels.coordinates([3, 2, 2], [5, 4, 3]) == 1).all()


# ---- the grid ----


def test_blocks_of_a_cooperative_grid_keep_their_own_shared_memory(
    kernels: ModuleType, rng: np.random.Generator
) -> None:
    x = rng.integers(0, 100, 9 * 40, dtype=np.int32)
    sums = x.reshape(9, 40).sum(axis=1)
    assert kernels.prefix_of_blocks(x, 9)[:9].tolist() == (np.cumsum(sums) - sums).tolist()


def test_blocks_that_wait_for_each_other_take_turns(kernels: ModuleType) -> None:
    assert kernels.pass_token(8).tolist() == [8, *range(0, 80, 10)]


def orders(host_kernels: ModuleType, num_blocks: int, num_threads: int) -> list[list[int]]:
    """Which thread took which turn, for each seed; every thread takes two."""
    found = []
    for seed in SEEDS:
        host_kernels.set_order(seed)
        found.append(host_kernels.arrival_order(num_blocks, num_threads)[1:].tolist())
    return found


def test_the_seed_decides_the_order_and_repeats_it(host_kernels: ModuleType) -> None:
    found = orders(host_kernels, 6, 64)
    assert found == orders(host_kernels, 6, 64)
    assert len({tuple(order) for order in found}) == len(SEEDS)
    assert all(sorted(order) == sorted([*range(6 * 64)] * 2) for order in found)


def test_any_block_may_be_the_first(host_kernels: ModuleType) -> None:
    first = [order[0] for order in orders(host_kernels, 64, 1)]
    assert max(first) >= 32
    assert min(first) < 32


def test_other_threads_may_run_between_two_atomics_of_one(host_kernels: ModuleType) -> None:
    for order in orders(host_kernels, 1, 64):
        gaps = [order[order.index(thread) + 1 :].index(thread) for thread in range(64)]
        assert any(gaps)


def test_shared_memory_is_poisoned_for_every_block(kernels: ModuleType) -> None:
    assert kernels.fresh_shared(0x7FFF7FFF, 20) == 20 * 2 * 64


# ---- warps ----


def shuffled(kind: str, lane: int, argument: int, width: int) -> int:
    """The lane that `lane` reads, from the definition of shfl in the PTX manual."""
    segment = lane // width * width
    last = segment + width - 1
    if kind == "idx":
        return segment + argument % width
    if kind == "up":
        return lane - argument if lane - argument >= segment else lane
    source = lane + argument if kind == "down" else lane ^ argument
    return source if source <= last else lane


@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64, np.int64])
def test_shuffles_read_the_lane_that_cuda_defines(host_kernels: ModuleType, kind: str, dtype: type) -> None:
    x = (np.arange(32) * 1000 + 7).astype(dtype)
    for width in (1, 2, 8, 16, 32):
        for argument in (0, 1, 3, 16, 31):
            host_kernels.set_order(width * argument)
            y = host_kernels.shuffle(kind, x, argument, width)
            wanted = [x[shuffled(kind, lane, argument, width)] for lane in range(32)]
            assert y.tolist() == wanted, (width, argument)


@pytest.mark.parametrize("mask", [ALL, 0x1, 0x80000001, 0x0F0F3355])
def test_votes_matches_and_reductions(kernels: ModuleType, rng: np.random.Generator, mask: int) -> None:
    x = rng.integers(-3, 4, 32, dtype=np.int32)
    result = kernels.warp_queries(x, mask).reshape(32, 10)
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    values = [int(x[lane]) for lane in lanes]
    bits = [value & ALL for value in values]
    for lane in lanes:
        wanted = [
            sum(1 << i for i in lanes if x[i] & 1),
            any(value & 1 for value in values),
            all(value & 1 for value in values),
            sum(1 << i for i in lanes if x[i] == x[lane]),
            mask if len(set(values)) == 1 else 0,
            sum(values) & ALL,
            min(values) & ALL,
            max(values) & ALL,
            np.bitwise_and.reduce(bits) ^ np.bitwise_or.reduce(bits),
            np.bitwise_xor.reduce(bits),
        ]
        assert result[lane].tolist() == [int(value) for value in wanted]


def test_halves_of_a_warp_go_different_ways_and_meet_again(
    kernels: ModuleType, rng: np.random.Generator
) -> None:
    x = rng.integers(0, 1000, 32, dtype=np.int32)
    low, high = int(x[:16].sum()), int(x[16:].max())
    assert kernels.half_warps(x).tolist() == [high] * 16 + [low] * 16


# ---- types ----


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint64, np.float32, np.float64])
def test_atomics(kernels: ModuleType, dtype: type) -> None:
    cells = np.zeros(16, dtype=dtype)
    if np.issubdtype(dtype, np.integer):
        cells[2], cells[5], cells[6] = 1000, 0x7FFF, 5
    if dtype is np.uint32:
        cells[9], cells[10] = 2, 1
    num_threads = 192
    seen = kernels.atomics(cells, num_threads)
    numbers = np.arange(1, num_threads + 1)
    assert sorted(seen.tolist()) == list(range(num_threads))  # each addition saw another sum
    assert cells[0] == num_threads
    if dtype is not np.float64:
        assert cells[1] in numbers
    if np.issubdtype(dtype, np.integer):
        wanted = [1, num_threads, np.bitwise_or.reduce(numbers), 0x7FFF & ~np.bitwise_or.reduce(numbers)]
        assert cells[2:6].tolist() == wanted
        assert cells[6:8].tolist() == [5 ^ np.bitwise_xor.reduce(numbers), num_threads]
    if dtype is np.uint32:
        assert cells[8:11].tolist() == [
            num_threads % 5,
            (2 - num_threads) % 5,
            (1 - numbers.sum()) % 2**32,
        ]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("half", torch.float16)])
def test_sixteen_bit_floats_convert_as_torch_does(
    host_kernels: ModuleType, name: str, dtype: torch.dtype
) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    widened = torch.from_numpy(getattr(host_kernels, f"from_{name}")(every.numpy()))
    wanted = every.view(dtype).float()
    assert torch.equal(widened.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0))

    # Each value, the midpoints to its neighbours, and both sides of those; then floats of every exponent.
    exact = wanted[wanted.isfinite()]
    bits = exact.view(torch.int32)
    half_step = 1 << (15 if dtype is torch.bfloat16 else 12)
    close = torch.cat(
        [(bits + offset).view(torch.float32) for offset in (half_step - 1, half_step, half_step + 1)]
    )
    spread = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(1))
    floats = torch.cat([exact, close, spread.to(torch.int32).view(torch.float32)])
    narrowed = torch.from_numpy(getattr(host_kernels, f"to_{name}")(floats.numpy())).view(dtype)
    assert torch.equal(narrowed.nan_to_num(nan=1.0), floats.to(dtype).nan_to_num(nan=1.0))
    assert torch.equal(narrowed.isnan(), floats.isnan())
