"""Seeds and generators."""

import os

import pytest
import torch

from dscoder.runtime.seed import (
    allow_fastest_kernels,
    available_threads,
    derive_seed,
    deterministic,
    random_state,
    restore_random_state,
)


def test_seeds_are_the_same_everywhere() -> None:
    assert derive_seed("order", 0, 1) == 976536042805888313


def test_parts_are_not_run_together() -> None:
    seeds = {derive_seed("ab", "c"), derive_seed("a", "bc"), derive_seed("1"), derive_seed(1)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("limit", "num_processes", "wanted"),
    [("", 1, 8), ("", 4, 2), ("1", 1, 1), ("3", 1, 3), ("3", 4, 2), ("99", 1, 8), ("4,2", 1, 8), ("0", 9, 1)],
)
def test_threads_are_the_share_of_the_cores_and_no_more_than_openmp_may_have(
    limit: str, num_processes: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert available_threads(num_processes) == wanted


def test_restored_generators_repeat_themselves() -> None:
    state = random_state()
    first = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_determinism_ends_with_its_block() -> None:
    num_threads = torch.get_num_threads()
    with deterministic(seed=1, num_threads=2):
        first = torch.rand(2)
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == num_threads
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(seed=1, num_threads=1):
        assert torch.equal(torch.rand(2), first)


def test_the_fastest_kernels_are_allowed_on_a_gpu_until_the_block_ends() -> None:
    with deterministic(seed=1, num_threads=1):
        allow_fastest_kernels(torch.device("cpu"))
        assert torch.are_deterministic_algorithms_enabled()
        allow_fastest_kernels(torch.device("cuda", 0))
        assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(seed=1, num_threads=1):
            allow_fastest_kernels(torch.device("cuda", 0))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
