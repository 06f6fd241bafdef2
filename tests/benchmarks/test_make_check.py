"""What `make gpu-check` would run, on machines with and without the environment of make."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of nothing but the Makefile."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "CMakeLists.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def planned(tree: Path, *arguments: str) -> str:
    command = ["make", "--dry-run", "-C", str(tree), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_check_installs_nothing_where_there_is_no_environment(tree: Path) -> None:
    said = planned(tree, "gpu-check", "OPS=moe_gate", "OBJECTS=objects")
    assert "python3 -m benchmarks.gpu_check moe_gate" in said
    assert "--objects objects" in said
    assert "--installed" not in said
    assert "pip" not in said


def test_a_check_with_the_environment_of_make_brings_it_up_to_date(tree: Path) -> None:
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").touch()
    said = planned(tree, "gpu-check")
    assert "pip install --quiet --no-build-isolation --editable" in said
    assert ".venv/bin/python -m benchmarks.gpu_check  --installed" in said


def test_a_chosen_python_is_kept(tree: Path) -> None:
    assert "mine -m benchmarks.gpu_check" in planned(tree, "gpu-check", "PY=mine")


@pytest.mark.parametrize("goal", ["test", "bench"])
def test_other_goals_set_the_environment_up(tree: Path, goal: str) -> None:
    assert "-m venv .venv" in planned(tree, goal)
