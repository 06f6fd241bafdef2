"""DSCODER_CUDA and DSCODER_CUDA_ARCHS: what is built, and what is said when it cannot be."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAIN_PATH = os.pathsep.join(("/usr/bin", "/bin"))

Configure = Callable[..., tuple[bool, str]]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Runs CMake's configure step alone; gives whether it succeeded and what it said, on one line."""
    scripts = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = shutil.which("cmake", path=scripts), shutil.which("ninja", path=scripts)
    assert cmake is not None, "cmake is missing: install the build tools of pyproject.toml"
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]

    def run(**environment: str) -> tuple[bool, str]:
        hidden = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "DSCODER_CUDA", "DSCODER_CUDA_ARCHS")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        done = subprocess.run(
            command,
            env={**kept, "PATH": PLAIN_PATH, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode == 0, " ".join(done.stdout.split())

    return run


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


def test_cutlass_headers_that_are_not_there_are_named(configure: Configure, tmp_path: Path) -> None:
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("no nvcc: CUTLASS is not looked for")
    succeeded, said = configure(CUDACXX=real, CUTLASS_DIR=str(tmp_path))
    assert not succeeded
    assert f"looked for '{tmp_path}/include/cutlass/version.h'" in said
