"""All kernel tests again under AddressSanitizer and UndefinedBehaviorSanitizer, and faults only they see.

The sanitizers' runtime must be the first library of a process, so each of these tests starts one.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Run = Callable[..., subprocess.CompletedProcess[str]]


def library_of(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return path


@pytest.fixture(scope="session")
def run(build_host: Callable[[str], Path]) -> Run:
    """Run Python with the sanitized modules on its path."""
    folder = build_host("sanitized")
    cache = (folder.parent / "CMakeCache.txt").read_text(encoding="utf-8")
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, flags=re.MULTILINE)
    assert compiler is not None
    # libstdc++ too: the runtime looks for its throw when it starts, before any extension has loaded it.
    libraries = [library_of(compiler[1], name) for name in ("libasan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself does not free everything
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DSCODER_HOST_BUILD": "sanitized",
        "PYTHONPATH": str(folder),
    }

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        *("test_host_executor", "test_host_faults", "test_moe_gate_host", "test_moe_balance_host"),
        *("test_moe_permute_host", "test_moe_unpermute_host"),
        *("test_rope_host", "test_latent_rope_host", "test_mla_decode_plan", "test_mla_decode_host"),
        *("test_mla_prefill_plan", "test_mla_prefill_host", "test_mla_prefill_backward_host"),
        *("test_ptx_host", "test_bulk_host", "test_grouped_gemm_host", "test_grouped_swiglu_host"),
        *("test_comm_host", "test_comm_timeouts", "test_comm_arguments"),
    ],
)
def test_the_kernel_tests_pass_under_the_sanitizers(run: Run, module: str) -> None:
    plugins = ("-p", "no:xdist", "-p", "no:cacheprovider")
    done = run("-m", "pytest", *plugins, "-s", "-k", "not compile", str(HERE / f"{module}.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


FAULTS = {
    "reads_past_global": r"heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*reads_past_global",
    "writes_past_shared": r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*writes_past_shared"
    r"|index 64 out of bounds for type 'float \[64\]'",
    "writes_past_dynamic": r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*writes_past_dynamic",
    "misaligned_vector": r"misaligned address 0x[0-9a-f]+ for type 'const struct float4'",
}
RUN_FAULT = """
import numpy as np, sys, _host_kernels
_host_kernels.run_fault(sys.argv[1], np.zeros(64, dtype=np.float32))
print("finished")
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_memory_is_reported_in_the_kernel(run: Run, fault: str) -> None:
    done = run("-c", RUN_FAULT, fault)
    assert done.returncode != 0
    assert "finished" not in done.stdout
    assert re.search(FAULTS[fault], done.stderr), done.stderr
    assert "faults.cu" in done.stderr


def test_a_right_kernel_finishes_under_the_sanitizers(run: Run) -> None:
    done = run("-c", RUN_FAULT, "missing_barrier")  # a race is not a fault of memory
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
