"""Where operands and sums of the sm_90a products lie: the copy engine played on the CPU, against CuTe.

Compiled by nvcc, run by the CPU: tests/csrc/sm90_layouts.cu says how.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "csrc" / "sm90_layouts.cu"
BUILD = ROOT / "build" / "layouts"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: the layouts are not compiled")


@pytest.fixture(scope="module")
def program() -> Path:
    """The compiled program, kept until a source changes."""
    state = hashlib.sha256()
    for path in sorted([SOURCE, *(ROOT / "csrc").glob("core/*.*h"), *(ROOT / "csrc").glob("gemm/*.*h")]):
        state.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    compiled = BUILD / state.hexdigest()[:16]
    if not compiled.exists():
        cutlass = importlib.metadata.distribution("nvidia-cutlass").locate_file("cutlass_library/source")
        half_done = compiled.with_suffix(".new")
        options = ["-std=c++20", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'csrc'}"]
        subprocess.run(
            [NVCC or "nvcc", *options, "-isystem", f"{cutlass}/include", SOURCE, "-o", half_done], check=True
        )
        half_done.rename(compiled)
    return compiled


def test_boxes_land_where_wgmma_reads_them_and_sums_are_where_they_are_stored(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    num_compared = int(done.stdout.split()[0])
    assert num_compared > 7_000_000
    assert done.stdout.endswith(" compared, 0 wrong\n")


def test_a_wrong_swizzle_is_seen(program: Path) -> None:
    done = subprocess.run([program, "planted"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "operand" in done.stdout
