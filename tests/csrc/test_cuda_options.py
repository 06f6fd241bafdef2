"""DSCODER_CUDA, its architectures and objects: what is built, and what is said when it cannot be."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import pybind11
import pytest

from dscoder.runtime import native

ROOT = Path(__file__).resolve().parents[2]
PLAIN_PATH = os.pathsep.join(("/usr/bin", "/bin"))
HIDDEN = (
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUTLASS_DIR",
    *(f"DSCODER_{x}" for x in ("CUDA", "CUDA_ARCHS", "KERNEL_OBJECTS")),
)

Configure = Callable[..., tuple[bool, str]]


def run_cmake(source: Path, build: Path, environment: Mapping[str, str]) -> tuple[bool, str]:
    """CMake's configure step alone: whether it succeeded and what it said, on one line."""
    scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=scripts), shutil.which("ninja", path=scripts)
    assert cmake is not None, "cmake is missing: install the build tools of pyproject.toml"
    command = [cmake, "-S", str(source), "-B", str(build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run(
        command,
        env={**kept, "PATH": PLAIN_PATH, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode == 0, " ".join(done.stdout.split())


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Configures dscoder in a fresh folder, with the given environment."""
    return lambda **environment: run_cmake(ROOT, tmp_path / "build", environment)


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Callable[[str], str]:
    """An nvcc that runs the given line of shell."""

    def write(line: str) -> str:
        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return str(path)

    return write


without_nvcc = pytest.mark.skipif(
    shutil.which("nvcc", path=PLAIN_PATH) is not None,
    reason="nvcc lies in a directory that no build can miss",
)


@without_nvcc
def test_auto_without_nvcc_builds_without_kernels(configure: Configure) -> None:
    succeeded, said = configure()
    assert succeeded, said
    assert "dscoder: building without kernels (no nvcc found)" in said


@without_nvcc
def test_on_without_nvcc_fails_and_names_both_ways_out(configure: Configure) -> None:
    succeeded, said = configure(DSCODER_CUDA="on")
    assert not succeeded
    assert "DSCODER_CUDA=on, but there is no nvcc" in said
    assert "or set DSCODER_CUDA=off to build without kernels" in said


def test_off_never_looks_for_nvcc(configure: Configure, fake_nvcc: Callable[[str], str]) -> None:
    succeeded, said = configure(DSCODER_CUDA="off", CUDACXX=fake_nvcc("exit 1"))
    assert succeeded, said
    assert "dscoder: building without kernels (DSCODER_CUDA=off)" in said


def test_an_old_nvcc_is_named_with_its_version(configure: Configure, fake_nvcc: Callable[[str], str]) -> None:
    nvcc = fake_nvcc("echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    succeeded, said = configure(CUDACXX=nvcc)
    assert not succeeded
    assert f"{nvcc} is of CUDA 11.8, the kernels need >= 12.3" in said
    assert "set DSCODER_CUDA=off" in said


def test_a_broken_nvcc_is_named_with_what_it_said(
    configure: Configure, fake_nvcc: Callable[[str], str]
) -> None:
    nvcc = fake_nvcc("echo 'cannot open shared object'; exit 127")
    succeeded, said = configure(CUDACXX=nvcc)
    assert not succeeded
    assert f"{nvcc} does not work" in said
    assert "cannot open shared object" in said


def test_a_word_that_is_no_choice_is_refused(configure: Configure) -> None:
    succeeded, said = configure(DSCODER_CUDA="maybe")
    assert not succeeded
    assert "DSCODER_CUDA must be auto, on or off, got 'maybe'" in said


@pytest.mark.parametrize("archs", ["90", "80;75", "all"])
def test_an_architecture_without_kernels_is_refused(
    configure: Configure, fake_nvcc: Callable[[str], str], archs: str
) -> None:
    nvcc = fake_nvcc("echo 'Cuda compilation tools, release 12.8, V12.8.1'")
    succeeded, said = configure(DSCODER_CUDA_ARCHS=archs, CUDACXX=nvcc)
    assert not succeeded
    assert "DSCODER_CUDA_ARCHS may hold 80 to 89 and 90a, got" in said


def test_kernels_that_need_cutlass_say_so_where_it_is_not(configure: Configure, tmp_path: Path) -> None:
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("no nvcc: CUTLASS is not looked for")
    succeeded, said = configure(CUDACXX=real, CUTLASS_DIR=str(tmp_path))
    assert not succeeded
    assert f"There are no CUTLASS headers (looked for '{tmp_path}/include/cutlass/version.h')" in said


WITH_CUTLASS = """
cmake_minimum_required(VERSION 3.28)
project(wants_cutlass LANGUAGES NONE)
set(DSCODER_WITHOUT_CUDA "or do without")
function(dscoder_option name default)
    set(${name} "$ENV{${name}}" PARENT_SCOPE)
endfunction()
"""


def test_cutlass_headers_that_are_not_there_are_named(tmp_path: Path) -> None:
    lists = f"{WITH_CUTLASS}include({ROOT}/third_party/cutlass.cmake)\n"
    (tmp_path / "CMakeLists.txt").write_text(lists, encoding="utf-8")
    succeeded, said = run_cmake(tmp_path, tmp_path / "build", {"CUTLASS_DIR": str(tmp_path)})
    assert not succeeded
    assert f"looked for '{tmp_path}/include/cutlass/version.h'" in said
    assert "or do without" in said


# ---- kernels compiled elsewhere; test_build_contract.py links and imports real ones ----


@pytest.fixture(scope="module")
def objects_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all configure steps below: the C++ compiler is looked at once."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """What of CUDA 13.0 a build from objects asks for."""
    for name, text in (
        ("include/cuda_runtime_api.h", "#define CUDART_VERSION  13000\n"),
        ("lib64/libcudart_static.a", ""),
    ):
        path = tmp_path / "toolkit" / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "toolkit"


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A library of nothing and a true stamp of these sources."""
    folder = tmp_path / "kernel objects"
    folder.mkdir()
    library, stamp = folder / "libdscoder_kernels.a", folder / "kernel-objects.json"
    library.write_text("!<arch>\n", encoding="utf-8")
    scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    facts = {"ROOT": ROOT, "LIBRARY": library, "STAMP": stamp, "NVCC": "13.0.88", "ARCHS": "80 90a"}
    facts |= {"FLAGS": "-O3", "COMPILER": native.build_tools()["compiler"], "PROCESSOR": os.uname().machine}
    options = [f"-D{name}={value}" for name, value in facts.items()]
    script = ROOT / "csrc" / "kernel_objects.cmake"
    subprocess.run([shutil.which("cmake", path=scripts) or "cmake", *options, "-P", script], check=True)
    return folder


def test_objects_that_fit_are_linked_without_nvcc(objects_build: Path, objects: Path, toolkit: Path) -> None:
    environment = {"DSCODER_KERNEL_OBJECTS": str(objects), "CUDA_HOME": str(toolkit), "DSCODER_CUDA": "on"}
    succeeded, said = run_cmake(ROOT, objects_build, environment)
    assert succeeded, said
    assert f"linking kernels for 80;90a compiled by nvcc 13.0.88 in {objects}" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "0"),
        ("sources", "0" * 64),
        ("nvcc", "12.9.86"),
        ("archs", "90a"),
        ("processor", "riscv64"),
        ("compiler", "GNU 99.1.0"),
        ("compiler", "Unheard 1.0.0"),
        ("library", "0" * 64),
    ],
)
def test_objects_that_do_not_fit_are_refused_by_what_differs(
    objects_build: Path, objects: Path, toolkit: Path, field: str, value: str
) -> None:
    stamp = objects / "kernel-objects.json"
    stored = json.loads(stamp.read_text(encoding="utf-8"))
    stamp.write_text(json.dumps({**stored, field: value}), encoding="utf-8")
    environment = {"DSCODER_KERNEL_OBJECTS": str(objects), "CUDA_HOME": str(toolkit)}
    succeeded, said = run_cmake(ROOT, objects_build, environment)
    assert not succeeded
    got = value.rpartition(".")[0] if field == "nvcc" else value
    assert f"do not fit, by their stamp's '{field}': they have '{got}', wanted '" in said
    assert "Run `make kernel-objects` where nvcc is" in said


def test_a_kernel_source_that_changed_changes_the_stamp(objects: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("csrc", "third_party"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy(ROOT / "CMakeLists.txt", tree)

    def sources() -> str:
        stamp, library = tmp_path / "stamp", objects / "libdscoder_kernels.a"
        command = [f"-DROOT={tree}", f"-DLIBRARY={library}", f"-DSTAMP={stamp}"]
        scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        cmake = shutil.which("cmake", path=scripts) or "cmake"
        subprocess.run([cmake, *command, "-P", tree / "csrc" / "kernel_objects.cmake"], check=True)
        return str(json.loads(stamp.read_text(encoding="utf-8"))["sources"])

    first = sources()
    assert first == json.loads((objects / "kernel-objects.json").read_text(encoding="utf-8"))["sources"]
    with (tree / "csrc" / "bind" / "moe.cpp").open("a", encoding="utf-8") as binding:
        binding.write("// no kernel is compiled from this\n")
    assert sources() == first
    with (tree / "csrc" / "core" / "math.h").open("a", encoding="utf-8") as header:
        header.write("// all kernels are\n")
    assert sources() != first


def test_objects_need_the_runtime_of_a_toolkit(objects_build: Path, objects: Path, tmp_path: Path) -> None:
    environment = {"DSCODER_KERNEL_OBJECTS": str(objects), "CUDA_HOME": str(tmp_path)}
    succeeded, said = run_cmake(ROOT, objects_build, environment)
    assert not succeeded
    assert "needs cuda_runtime_api.h and libcudart_static.a of a CUDA toolkit" in said


def test_a_folder_without_objects_is_named(objects_build: Path, tmp_path: Path) -> None:
    succeeded, said = run_cmake(ROOT, objects_build, {"DSCODER_KERNEL_OBJECTS": str(tmp_path)})
    assert not succeeded
    assert f"{tmp_path} must hold libdscoder_kernels.a and kernel-objects.json" in said
