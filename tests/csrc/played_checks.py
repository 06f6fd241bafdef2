"""What the tests of programs that play sm_90a's hardware share (dscoder.testing.played)."""

from pathlib import Path

import pytest

from dscoder.testing.played import CXX, NVCC, run

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: the layouts are not compiled")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler: the tiles are not compiled")


def assert_all_agree(layouts: Path, *, more_than: int) -> None:
    """Everything that the program compares is where it is wanted, and it compares that much."""
    done = run(layouts)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > more_than
    assert done.stdout.endswith(" compared, 0 wrong\n")


def planted_swizzle(layouts: Path) -> str:
    """What the program says of a wrong swizzle, which it must not take for right."""
    done = run(layouts, "planted")
    assert done.returncode == 1
    return done.stdout


def assert_all_right(cases: Path, *, num_cases: int) -> None:
    """Every case of the program is right."""
    done = run(cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["right"] * num_cases


def right_cases(cases: Path, planted: str, *, num_cases: int) -> set[str]:
    """The names, which come first on each line, of the cases that are right with a mistake planted."""
    lines = run(cases, planted).stdout.splitlines()
    assert len(lines) == num_cases
    return {line[:24].strip() for line in lines if line.split()[-1] == "right"}
