"""The build contract: what the compiler makes of every kernel, checked without a GPU.

Every .cu of the extension is compiled for sm_80 and sm_90a with the extension's own flags, ptxas talking. No
kernel may spill, none may carry a warning that costs Hopper its tensor cores, and the machine code of each
must hold what its design rests on (dscoder.testing.contract).
"""

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pybind11
import pytest

from dscoder.testing.contract import ARCHS, SPILLS, Kernel, broken, broken_blanking, broken_overlap
from dscoder.testing.contract_comm import broken_exchange
from dscoder.testing.contract_kernels import KERNELS, ROW_KERNELS
from dscoder.testing.machine_code import (
    Usage,
    broken_prefill,
    broken_telling,
    broken_turning,
    losses,
    parse_sass,
    parse_usage,
    readable,
)

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "contract"
PTXAS_FLAGS = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: the kernels are not compiled")


# ---- compiling ----


def tool(name: str) -> str:
    """A binary that a pinned NVIDIA package brings."""
    files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    return next(str(file.locate()) for file in files if file.name == name)


def sass_of(path: Path, arch: str) -> dict[str, list[str]]:
    search = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    command = [tool("cuobjdump"), "-sass", "-arch", arch, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": search}
    )
    return parse_sass(done.stdout)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def digest() -> str:
    """Of everything that goes into the machine code."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cmake")]
    state = hashlib.sha256(run(NVCC or "nvcc", "--version").encode() + PTXAS_FLAGS.encode())
    for path in sorted([*sources, ROOT / "CMakeLists.txt", *(ROOT / "third_party").iterdir()]):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def cmake_and_ninja() -> tuple[str, str]:
    scripts = sysconfig.get_path("scripts")
    search = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
    assert cmake is not None, "cmake is missing: install the build tools of pyproject.toml"
    assert ninja is not None, "ninja is missing: install the build tools of pyproject.toml"
    return cmake, ninja


def compile_kernels() -> str:
    cmake, ninja = cmake_and_ninja()
    run(
        *(
            cmake,
            "-G",
            "Ninja",
            "-S",
            ROOT,
            "-B",
            BUILD,
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DDSCODER_CUDA=on",
        ),
        f"-DDSCODER_CUDA_ARCHS={';'.join(arch.removeprefix('sm_') for arch in ARCHS)}",
        f"-DCMAKE_CUDA_FLAGS={PTXAS_FLAGS}",
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    )
    return run(cmake, "--build", BUILD, "--target", "dscoder_kernels", "--clean-first")


@pytest.fixture(scope="session")
def report() -> str:
    """What the compiler said about all kernels; kept until a source changes, built by one process alone."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = BUILD / f"report-{digest()}.txt"
        if not kept.exists():
            said = compile_kernels()
            for stale in BUILD.glob("report-*.txt"):
                stale.unlink()
            kept.write_text(said)
        return kept.read_text()


@pytest.fixture(scope="session")
def sass(report: str) -> dict[tuple[str, str], list[str]]:
    assert report
    objects = sorted(BUILD.rglob("*.cu.o"))
    return {
        (name, arch): opcodes
        for arch in ARCHS
        for path in objects
        for name, opcodes in sass_of(path, arch).items()
    }


# ---- the contract ----


@needs_nvcc
def test_the_compiler_has_nothing_to_warn_of(report: str) -> None:
    assert losses(report) == []
    assert [line for line in report.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)] == []


@needs_nvcc
def test_every_kernel_has_a_row_on_every_architecture(report: str) -> None:
    wanted = {(name, arch) for name, kernel in KERNELS.items() for arch in kernel.archs}
    assert parse_usage(report).keys() == wanted


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_keeps_its_contract(
    name: str,
    arch: str,
    report: str,
    sass: dict[tuple[str, str], list[str]],
    record_property: Callable[[str, object], None],
) -> None:
    kernel = KERNELS[name]
    if arch not in kernel.archs:
        pytest.skip(f"not compiled for {arch}")
    usage = parse_usage(report)[name, arch]
    record_property("registers", usage.registers)
    record_property("shared", usage.shared)
    assert broken(kernel, usage, sass[name, arch], may_spill=SPILLS.get(name, 0)) == []
    if kernel.is_overlapped and arch == "sm_90a":
        assert broken_overlap(sass[name, arch]) == []
    if kernel.reaches_peers:
        assert broken_exchange(sass[name, arch]) == []
    if kernel.blanks:
        assert broken_blanking(sass[name, arch]) == []
    if kernel.tells:
        assert broken_telling(sass[name, arch]) == []
    if kernel.weighs:
        assert broken_prefill(sass[name, arch], kernel.weighs) == []
    if kernel.turns:
        assert broken_turning(sass[name, arch], kernel.turns) == []


@needs_nvcc
def test_the_objects_make_an_extension_where_there_is_no_nvcc(report: str, tmp_path: Path) -> None:
    """Those that the contract compiled, stamped; of the toolkit, headers and libraries are seen alone."""
    assert report
    toolkit = re.search(r"#\$ TOP=(.+)", run(NVCC or "nvcc", "--dryrun", "-c", "x.cu"))
    assert toolkit is not None
    for part in ("include", "lib64"):
        (tmp_path / part).symlink_to(Path(toolkit[1]).resolve() / part)
    cmake, ninja = cmake_and_ninja()
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(cmake, "--build", BUILD, "--target", "kernel_objects")
        for name in ("libdscoder_kernels.a", "kernel-objects.json"):
            shutil.copy(BUILD / name, tmp_path)
    settings = {"CMAKE_MAKE_PROGRAM": ninja, "Python_EXECUTABLE": sys.executable, "DSCODER_CUDA": "on"}
    settings |= {"pybind11_DIR": pybind11.get_cmake_dir(), "DSCODER_KERNEL_OBJECTS": tmp_path}
    without_nvcc = ("env", "-u", "CUDACXX", "-u", "CUDA_PATH", f"CUDA_HOME={tmp_path}", "PATH=/usr/bin:/bin")
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run(*without_nvcc, cmake, "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", *options)
    run(*without_nvcc, cmake, "--build", tmp_path / "build", "--target", "_C")
    look = f"import sys; sys.path.insert(0, {str(tmp_path / 'build')!r}); import _C; print(_C.cuda_archs)"
    assert run(sys.executable, "-c", look).strip() == str(tuple(arch.removeprefix("sm_") for arch in ARCHS))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [name for name in ROW_KERNELS if name.startswith("moe_unpermute")])
def test_all_rows_of_a_token_are_in_flight_before_one_is_used(
    name: str, arch: str, sass: dict[tuple[str, str], list[str]]
) -> None:
    opcodes = sass[name, arch]
    gathers = [i for i, opcode in enumerate(opcodes) if opcode.startswith("LDG.E.EF.128")]
    between = opcodes[gathers[0] : gathers[-1]]
    assert [opcode for opcode in between if opcode.startswith(("FFMA", "FMUL", "STG"))] == []


# ---- the contract catches planted faults ----

SPILLING = """
__global__ void __launch_bounds__(1024) spill(const float* in, float* out) {
    float kept[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) kept[i] = in[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int round = 0; round < 9; ++round) {
#pragma unroll
        for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 7) % 64] + kept[(i * 5 + 1) % 64];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = kept[i];
}
"""


@needs_nvcc
def test_a_planted_spill_is_caught(tmp_path: Path) -> None:
    source, compiled = tmp_path / "spill.cu", tmp_path / "spill.o"
    source.write_text(SPILLING)
    said = run(
        NVCC or "nvcc", "-O3", "-arch=sm_80", "-maxrregcount=32", PTXAS_FLAGS, "-c", source, "-o", compiled
    )
    usage = parse_usage(said)["spill", "sm_80"]
    opcodes = sass_of(compiled, "sm_80")["spill"]
    assert usage.spilled > 0
    clauses = " ".join(broken(Kernel(registers=255), usage, opcodes))
    for clause in ("bytes spilled", "x STL", "x LDL"):
        assert clause in clauses


def test_a_serialised_wgmma_is_caught() -> None:
    said = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
        " due to the presence of Extern calls in the function 'f'"
    )
    assert losses(said) == [said]
    assert losses("ptxas info    : (C7519) warpgroup.arrive is injected in around line 9") == []


@pytest.mark.parametrize(
    ("usage", "opcodes", "wanted"),
    [
        (Usage(registers=65, shared=0, spilled=0), {"LDG.E.128": 2}, ["65 registers, at most 64"]),
        (Usage(registers=64, shared=4, spilled=0), {"LDG.E.128": 2}, ["4 bytes of shared memory, at most 0"]),
        (Usage(registers=64, shared=0, spilled=0), {"LDG.E": 8}, ["0 x LDG.E.128, at least 2"]),
        (Usage(registers=64, shared=0, spilled=0), {"LDG.E.128.CONSTANT": 2, "STL.64": 1}, ["1 x STL"]),
        (Usage(registers=64, shared=0, spilled=0), {"LDG.E.128": 2}, []),
    ],
)
def test_each_broken_clause_is_named(usage: Usage, opcodes: dict[str, int], wanted: list[str]) -> None:
    kernel = Kernel(registers=64, wants={"LDG.E.128": 2})
    assert broken(kernel, usage, list(Counter(opcodes).elements())) == wanted


@pytest.mark.parametrize(
    ("opcodes", "wanted"),
    [
        ("LDC ACQBULK LDG.E.128 PREEXIT STG.E EXIT", []),
        ("LDC LDG.E.128 STG.E EXIT", ["no ACQBULK", "no PREEXIT"]),
        ("LDG.E PREEXIT EXIT ACQBULK STG.E EXIT", ["LDG.E above the wait", "EXIT above the wait"]),
    ],
)
def test_a_kernel_that_does_not_wait_for_the_one_ahead_is_caught(opcodes: str, wanted: list[str]) -> None:
    assert broken_overlap(opcodes.split()) == wanted


WAIT, FENCE = "SYNCS.PHASECHK.TRANS64.TRYWAIT", "FENCE.VIEW.ASYNC.S"
STORE, MEET, BEGIN, MULTIPLY = "STS.128", "BAR.SYNC.DEFER_BLOCKING", "WARPGROUP.ARRIVE", "HGMMA.64x256x16.F32"


@pytest.mark.parametrize(
    ("opcodes", "is_right"),
    [
        (
            (FENCE, "STS", MEET, WAIT, STORE, STORE, "MEMBAR.ALL.CTA", FENCE, MEET, BEGIN, MULTIPLY, WAIT),
            True,
        ),
        ((WAIT, STORE, MEET, BEGIN, MULTIPLY, FENCE), False),
        ((STORE, WAIT, STORE, FENCE, MEET, BEGIN, MULTIPLY), False),
        ((WAIT, STORE, FENCE, STORE, MEET, BEGIN, MULTIPLY), False),
        ((WAIT, STORE, MEET, FENCE, BEGIN, MULTIPLY), False),
        ((WAIT, STORE, FENCE, BEGIN, MEET, MULTIPLY), False),
        ((WAIT, STORE, FENCE, MEET, BEGIN, MULTIPLY, STORE, MULTIPLY), False),
        ((WAIT, FENCE, MEET, BEGIN, MULTIPLY), False),
    ],
)
def test_lines_blanked_out_of_order_are_caught(opcodes: tuple[str, ...], is_right: bool) -> None:
    assert (broken_blanking(opcodes) == []) == is_right


BLANKED, TOLD = (STORE, STORE, FENCE, MEET, BEGIN, MULTIPLY), (MEET, "STS", "STS", FENCE, "BAR.ARV")


@pytest.mark.parametrize(
    ("opcodes", "is_right"),
    [
        ((FENCE, MEET, BEGIN, MULTIPLY, "STS", *TOLD, *BLANKED, WAIT, *TOLD, *BLANKED, "STS", MEET), True),
        ((*TOLD, *BLANKED, STORE, MEET, FENCE, BEGIN, MULTIPLY), False),
        ((*TOLD, *BLANKED, STORE, FENCE, BEGIN, MULTIPLY), False),
        ((*TOLD, *BLANKED, "STS", FENCE, "BAR.ARV"), False),
        ((*TOLD, *BLANKED, MEET, "STS", "BAR.ARV", FENCE), False),
        ((*TOLD, *BLANKED, MEET, FENCE, "STS", "BAR.ARV"), False),
        (TOLD, False),
    ],
)
def test_writes_for_other_warps_out_of_order_are_caught(opcodes: tuple[str, ...], is_right: bool) -> None:
    assert (broken_telling(opcodes) == []) == is_right


WEIGHED = ("WARPGROUP.DEPBAR.LE", "MUFU.EX2", "MUFU.EX2", "WARPGROUP.DEPBAR.LE")
LOADED = (STORE, "UTMALDG.3D")


@pytest.mark.parametrize(
    ("opcodes", "wanted"),
    [
        ((*LOADED, *BLANKED, *WEIGHED, MULTIPLY), []),
        ((*BLANKED, *WEIGHED[:2], *WEIGHED[3:], "MUFU.EX2"), ["1 x MUFU.EX2 under a product, at least 2"]),
        ((*BLANKED, *WEIGHED[:2], MULTIPLY, *WEIGHED[2:]), ["0 x MUFU.EX2 under a product, at least 2"]),
        ((*LOADED, *WEIGHED), ["no zeros"]),
        (
            (STORE, MEET, FENCE, BEGIN, *WEIGHED),
            ["in the order STS.128 BAR.SYNC FENCE.VIEW.ASYNC WARPGROUP.ARRIVE"],
        ),
    ],
)
def test_a_softmax_behind_its_product_is_caught(opcodes: tuple[str, ...], wanted: list[str]) -> None:
    assert broken_prefill(opcodes, 2) == wanted


TURNED, SUMMED, STORED = (
    ("STSM.16.MT88.4", FENCE, MEET, MULTIPLY),
    ("STS", FENCE, "SYNCS.ARRIVE"),
    (MEET, "STSM"),
)


@pytest.mark.parametrize(
    ("opcodes", "is_right"),
    [
        ((*TURNED, *SUMMED, *STORED), True),
        ((*TURNED[:1], MEET, FENCE, MULTIPLY, *SUMMED, *STORED), False),
        ((*TURNED, "STS", "SYNCS.ARRIVE", FENCE, *STORED), False),
        ((*TURNED[:2], MULTIPLY, MEET, *SUMMED, *STORED), False),
        ((*TURNED, *STORED), False),
    ],
)
def test_turned_scores_out_of_order_are_caught(opcodes: tuple[str, ...], is_right: bool) -> None:
    assert (broken_turning(opcodes, 2) == []) == is_right


def test_names_are_readable() -> None:
    symbol = (
        "_ZN3dsc44_GLOBAL__N__f2ee5c84_11_moe_gate_cu_0876e32715moe_gate_kernelINS0_6LayoutILi8ELi20ELi8E"
        "LNS0_6GroupsE1EEEEEvNS_13MoeGateParamsE"
    )
    assert readable(symbol) == "moe_gate_kernel<Layout<8, 20, 8, (Groups)1>>"
