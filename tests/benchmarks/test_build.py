"""How benchmarks.check builds dscoder, and what it says when it cannot. A real build is in tests/csrc."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dscoder
from benchmarks.check import build
from benchmarks.check.machine import find_sanitizer, toolkit_environment
from benchmarks.check.process import Ended, Runner


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path, tmp_path / "logs", os.environ)


def program(folder: Path, name: str) -> Path:
    """An empty program."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    return folder / name


def test_cmake_is_told_this_python_and_the_version(tmp_path: Path) -> None:
    command = build.configure_command(tmp_path, ["DSCODER_CUDA_ARCHS=90a"], os.environ)
    assert {
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSKBUILD_PROJECT_VERSION={dscoder.__version__}",
        "-DDSCODER_CUDA=on",
        "-DDSCODER_CUDA_ARCHS=90a",
    } <= set(command)


def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ValueError, match=r"^no-such-tool is missing: install the build group"):
        build.tool("no-such-tool", {"PATH": str(tmp_path)})


def test_programs_of_carried_wheels_are_found(tmp_path: Path) -> None:
    carried = program(tmp_path / "bin", "carried-tool")
    assert build.tool("carried-tool", {"PATH": str(tmp_path / "bin")}) == str(carried)


@pytest.mark.parametrize(("capability", "arch"), [((9, 0), "90a"), ((8, 0), "80"), ((8, 6), "86")])
def test_kernels_are_compiled_for_the_gpu_alone(capability: tuple[int, int], arch: str) -> None:
    assert build.archs_for(capability) == arch


def test_without_nvcc_and_objects_both_ways_out_are_named(runner: Runner) -> None:
    runner.environment = {"PATH": "/nowhere"}
    with pytest.raises(ValueError, match=r"no nvcc .* run `make kernel-objects` where nvcc is"):
        build.build(runner, capability=(9, 0), objects=None, limit=10.0)


@pytest.mark.parametrize(("code", "is_used"), [(0, True), (1, False)])
def test_objects_that_lie_there_are_linked_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, runner: Runner, tmp_path: Path, code: int, is_used: bool
) -> None:
    seen = []

    def run(command: list[str], *, name: str, limit: float) -> Ended:
        seen.extend(command)
        return Ended(code=code, seconds=1.0, output="")

    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1"\n', encoding="utf-8")
    monkeypatch.setattr(runner, "run", run)
    assert build.find_objects(runner, 10.0) is None
    assert not seen
    folder = tmp_path / "build" / "kernel-objects"
    folder.mkdir(parents=True)
    (folder / build.STAMP).touch()
    assert build.find_objects(runner, 10.0) == (folder if is_used else None)
    assert f"-DDSCODER_KERNEL_OBJECTS={folder}" in seen


def test_the_copied_package_says_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "SITE", tmp_path)
    build.copy_package()
    look = "import dscoder, sys; print(dscoder.__version__, dscoder.__file__)"
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.meta_path[:] = "
        "[one for one in sys.meta_path if not type(one).__name__.startswith('ScikitBuild')]; " + look,
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said == [dscoder.__version__, str(tmp_path / "dscoder" / "__init__.py")]
    assert not list(tmp_path.rglob("*.so"))


def test_an_install_that_hides_the_build_is_named(runner: Runner, tmp_path: Path) -> None:
    """The editable install of this environment comes before any path."""
    ended = build.try_import(runner, capability=(9, 0), site=tmp_path / "elsewhere", limit=60.0)
    assert ended.code == 1
    assert "use that one (--installed), or another Python" in ended.output


def test_wheels_are_unpacked_beside_the_build(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    wheels = tmp_path / "carried"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "x = 1\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    target = build.unpack_wheels(runner, wheels, 120.0)
    assert target.is_relative_to(tmp_path)
    assert (target / "tiny.py").read_text(encoding="utf-8") == "x = 1\n"


def test_a_folder_without_wheels_is_named(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--wheels: .* holds no \.whl file$"):
        build.unpack_wheels(runner, tmp_path, 10.0)


def test_the_toolkit_of_habit_is_the_last_resort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.check.machine.CUDA_FOLDER", tmp_path)
    assert toolkit_environment({"PATH": "/nowhere"}) == {"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}
    assert toolkit_environment({"PATH": "", "CUDA_PATH": "/mine"}) == {"PATH": "", "CUDA_PATH": "/mine"}
    with_nvcc = {"PATH": str(program(tmp_path / "bin", "nvcc").parent)}
    assert toolkit_environment(with_nvcc) == with_nvcc


def test_compute_sanitizer_is_found_in_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.check.machine.CUDA_FOLDER", tmp_path / "none")
    assert find_sanitizer({"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}) is None
    found = program(tmp_path / "compute-sanitizer", "compute-sanitizer")
    assert find_sanitizer({"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}) == str(found)
