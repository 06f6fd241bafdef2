"""What several benchmarks share: real source code to measure on, and a line of results for each."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dscoder.testing import results


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """A stored run says what it ran on."""
    results.describe_machine(machine_info, results.measured_device())


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """A stored run is small enough to keep."""
    results.drop_rounds(output_json)


@pytest.fixture(autouse=True)
def shown(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[None]:
    """Prints what a benchmark stores beside its times (pytest-benchmark shows the times alone)."""
    yield
    if not benchmark.disabled:
        figures = ", ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
        sys.stdout.write(f"\n{request.node.name}: {figures}\n")


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """The Python files of the standard library, without what is installed beside it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # test files in other encodings
            continue
    return texts


@pytest.fixture(scope="session")
def source_megabytes(source_texts: list[str]) -> float:
    """Their size in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in source_texts) / 1e6
