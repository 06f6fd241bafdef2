"""Programs that play sm_90a's hardware on the CPU, compiled once for each state of the sources.

They are kept in build/played: by any C++ compiler with the host executor, or by nvcc where they read CuTe's
layouts.
"""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS, CSRC, BUILD = ROOT / "tests" / "csrc", ROOT / "csrc", ROOT / "build" / "played"
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++") or shutil.which("c++")
INCLUDED = ("core/*.*h", "gemm/*.*h", "attention/*.*h", "attention/*_rows.cu", "host/*.*")  # below csrc


def compiled(*command: str | Path) -> Path:
    """The program that the command makes, by the hash of the command and of all it may include."""
    sources = [path for pattern in INCLUDED for path in CSRC.glob(pattern)] + [*TESTS.glob("*.h")]
    state = hashlib.sha256(" ".join(map(str, command)).encode())
    for path in sorted([*sources, *(part for part in command if isinstance(part, Path))]):
        state.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / state.hexdigest()[:16]
    if not program.exists():
        half_done = BUILD / f"{program.name}.{os.getpid()}"
        subprocess.run([*command, "-o", half_done], check=True)
        half_done.rename(program)
    return program


def layout_program(name: str) -> Path:
    """tests/csrc/<name> by nvcc, with CuTe."""
    cutlass = importlib.metadata.distribution("nvidia-cutlass").locate_file("cutlass_library/source/include")
    includes = [f"-I{CSRC}", f"-I{TESTS}", "-isystem", str(cutlass)]
    options = ["-std=c++20", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", *includes]
    return compiled(NVCC or "nvcc", *options, TESTS / name)


def host_program(name: str) -> Path:
    """tests/csrc/<name> with the host executor."""
    options = ["-std=c++20", "-O2", "-DDSC_HOST_EXECUTOR", "-fno-strict-aliasing", f"-I{CSRC}", f"-I{TESTS}"]
    return compiled(CXX or "g++", *options, TESTS / name, *sorted(CSRC.glob("host/*.cpp")))


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the program says, and how it ends."""
    return subprocess.run([program, *arguments], capture_output=True, text=True)
