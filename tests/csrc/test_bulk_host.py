"""The copy engine of sm_90 on the host executor: bulk copies land no sooner than they must, and whoever looks
or ends too early shows."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

X = np.arange(1, 65, dtype=np.float32)


def run(host_kernels: ModuleType, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    y, seen = host_kernels.bulk(X, getattr(host_kernels.Bulk, kind))
    return y, seen


def test_a_row_goes_through_shared_memory(host_kernels: ModuleType) -> None:
    y, seen = run(host_kernels, "WAITED")
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(seen, X)


def test_a_load_read_before_its_wait_is_nan(host_kernels: ModuleType) -> None:
    assert np.isnan(run(host_kernels, "LOAD_UNWAITED")[1]).all()


def test_a_store_reads_its_source_as_late_as_it_may(host_kernels: ModuleType) -> None:
    y, _ = run(host_kernels, "OVERWRITTEN")
    np.testing.assert_array_equal(y, [-1, *X[1:]])


def test_a_store_is_not_made_when_its_source_is_read(host_kernels: ModuleType) -> None:
    y, seen = run(host_kernels, "STORE_UNWAITED")
    np.testing.assert_array_equal(seen, np.zeros_like(X))
    np.testing.assert_array_equal(y, X)


def test_a_store_whose_source_is_read_is_made_when_the_thread_ends(host_kernels: ModuleType) -> None:
    np.testing.assert_array_equal(run(host_kernels, "READ_ALONE")[0], X)


@pytest.mark.parametrize("kind", ["LOAD_LEFT", "STORE_LEFT", "UNCOMMITTED"])
def test_a_thread_that_ends_while_its_shared_memory_is_in_use_is_an_error(
    host_kernels: ModuleType, kind: str
) -> None:
    with pytest.raises(RuntimeError, match="ends while the copy engine works on its shared memory"):
        run(host_kernels, kind)
    np.testing.assert_array_equal(run(host_kernels, "WAITED")[0], X)  # the executor goes on


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("NEXT_PHASE", r"mbarrier\.try_wait: nothing is under way that would end the phase"),
        ("MISALIGNED", r"cp\.async\.bulk load: off 16 bytes"),
        ("EMPTY", r"cp\.async\.bulk load: no bytes"),
        ("INTO_GLOBAL", r"cp\.async\.bulk load: not in the block's shared memory"),
    ],
)
def test_a_wrong_copy_is_an_error_with_its_place(host_kernels: ModuleType, kind: str, wanted: str) -> None:
    with pytest.raises(RuntimeError, match=rf"thread .*{wanted} at .*bulk_kernels.cu:\d+ in .*bulk_kernel"):
        run(host_kernels, kind)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_same_kernel(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = ["nvcc", "-std=c++20", "-arch=sm_90a", f"-I{here.parents[1] / 'csrc'}", "-c"]
    files = ["-o", str(tmp_path / "kernels.o"), str(here / "bulk_kernels.cu")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
