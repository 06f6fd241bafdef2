"""Every planted mistake of faults.cu is seen: races as wrong results, the rest as errors that name it."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SEEDS = range(12)
X = np.arange(64, dtype=np.float32)


# ---- races: wrong results, under some order ----


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_second_barrier", "missing_syncwarp"])
def test_a_race_gives_a_wrong_result_under_some_order(host_kernels: ModuleType, fault: str) -> None:
    num_wrong = 0
    for seed in SEEDS:
        host_kernels.set_order(seed)
        num_wrong += not np.array_equal(host_kernels.run_fault(fault, X), X[::-1])
    assert num_wrong >= len(SEEDS) // 2


def test_uninitialised_shared_memory_is_nan(host_kernels: ModuleType) -> None:
    y = host_kernels.run_fault("uninitialised_shared", X)
    assert np.isnan(y[63])
    np.testing.assert_array_equal(y[:63], X[:0:-1])


def test_a_lane_outside_the_mask_reads_as_nan(host_kernels: ModuleType) -> None:
    y = host_kernels.run_fault("reads_a_lane_outside_the_mask", X)
    np.testing.assert_array_equal(y[:8], X[8:16])
    assert np.isnan(y[8:16]).all()


# ---- errors ----

ERRORS = {
    "exits_before_warp": r"wrong mask: thread .* names lanes that have exited or do not exist at __syncwarp "
    r"\(mask 0xffffffff\) .*faults.cu:\d+ in .*one_thread_exits.*; the live lanes are 0xffffffdf",
    "exits_after_warp": r"divergent warp: thread \(5,0,0\) of block \(0,0,0\) exits while 31 lanes wait for "
    r"it at __syncwarp \(mask 0xffffffff\) at .*faults.cu:\d+ in .*one_thread_exits",
    "exits_before_block": r"divergent barrier: .* waits at __syncthreads at .* but 1 threads have exited",
    "exits_after_block": r"divergent barrier: thread \(5,0,0\) .* while 63 threads wait at __syncthreads",
    "exits_before_grid": r"divergent barrier: .* at this_grid\(\).sync\(\) at .* but 1 threads have exited",
    "exits_after_grid": r"divergent barrier: .* exits while 127 threads wait at this_grid\(\).sync\(\)",
    "two_barriers": r"divergent barrier: thread \(\d+,0,0\) .* waits at __syncthreads at .*faults.cu:\d+ .*"
    r"while \d+ threads wait at __syncthreads at .*faults.cu:\d+",
    "barrier_against_warp": r"deadlock: no thread can go on:(.|\n)*2 threads .* wait at __syncthreads",
    "lane_outside_its_mask": r"wrong mask: thread \((0|32),0,0\) .* is not in its own mask at "
    r"__shfl_sync \(mask 0xfffffffe\)",
    "masks_that_differ": r"divergent warp: thread .* __shfl_xor_sync \(mask 0x[0-9a-f]+\)",
    "shuffle_in_a_branch": r"(divergent warp: thread .* exits while \d+ lanes wait for it at __shfl_xor_sync"
    r"|wrong mask: .* names lanes that have exited)",
    "partial_warp": r"(names lanes that have exited or do not exist .* live lanes are 0x000000ff"
    r"|exits while \d+ lanes wait|names lanes that have exited)",
    "grid_sync_without_cooperative_launch": r"not launched with launch_cooperative",
    "one_thread_never_waits": r"thread \(5,0,0\) of block \(0,0,0\) ends an overlapped launch without "
    r"wait_for_previous_kernel\(\)",
    "waits_for_nobody": r"livelock: thread .* only yield",
    "too_many_threads": r"the block has 1025 threads, 1 in z; at most 1024, 64 in z",
    "too_much_shared_memory": r"233472 bytes of shared memory, at most 232448",
}


@pytest.mark.parametrize("fault", ERRORS)
def test_a_fault_is_an_error_under_every_order(host_kernels: ModuleType, fault: str) -> None:
    for seed in SEEDS if fault != "waits_for_nobody" else range(1):
        host_kernels.set_order(seed)
        with pytest.raises(RuntimeError, match=ERRORS[fault]):
            host_kernels.run_fault(fault, X)
    assert host_kernels.block_sum(X, 2) == X.sum()  # the executor goes on working


# ---- the test kernels are CUDA; what CUDA does not have does not compile ----


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["kernels.cu", "ptx_kernels.cu", "faults.cu"])
def test_nvcc_compiles_the_same_kernels(tmp_path: Path, name: str) -> None:
    command = ["nvcc", "-std=c++20", "-arch=sm_80", f"-I{CSRC}", "-c", "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run([*command, str(HERE / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PRELUDE = '#include "core/launch.h"\n__global__ void kernel(long* x, float* y) {'


def compile_kernel(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    source = folder / "kernel.cpp"
    source.write_text(f"{PRELUDE} {body} }}")
    command = ["c++", "-std=c++20", "-fsyntax-only", "-DDSC_HOST_EXECUTOR", f"-I{CSRC}", str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.usefixtures("host_folder")  # skips where there is no compiler
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("__shared__ float tile[4]; y[0] = tile[0];", "declared through DSC_SHARED"),
        ("atomicAdd(x, 1);", "atomicAdd"),
        ("threadIdx.x = 1;", "threadIdx"),
        ("y[0] = __shfl_sync(~0u, float2(), 0).x;", "__shfl_sync"),
    ],
)
def test_code_outside_cuda_does_not_compile(tmp_path: Path, body: str, message: str) -> None:
    done = compile_kernel(tmp_path, body)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.usefixtures("host_folder")
def test_code_inside_cuda_does_compile(tmp_path: Path) -> None:
    done = compile_kernel(tmp_path, "y[0] = x[threadIdx.x];")
    assert done.returncode == 0, done.stderr
