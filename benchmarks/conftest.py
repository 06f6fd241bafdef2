"""What the benchmarks share: the engine with this machine's clock, real source code, a line a result."""

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dscoder.testing.measure
from benchmarks.shapes import DEVICE
from dscoder.testing import gpu, results
from dscoder.testing.aside import Aside
from dscoder.testing.timing import clock_for, device_name

CHECKOUT = Path(__file__).resolve().parents[1]
SHOWN = (
    "us",
    "call_us",
    "TFLOP/s",
    "GB/s",
    "share",
    "MB/s",
    "tokens/s",
    "MFU",
    "documents/s",
    "programs/s",
    "launches",
)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """A stored run says what it ran on."""
    results.describe_machine(machine_info, DEVICE, CHECKOUT)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """A stored run is small enough to keep, and its ceilings are those of the whole run."""
    results.settle(output_json)
    results.drop_rounds(output_json)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Callable[..., None]:
    """`measure(case, problem, ours, peers)` of dscoder.testing.measure, on this machine's clock."""
    run = functools.partial(dscoder.testing.measure.measure, benchmark, clock_for(DEVICE))
    if request.config.getoption("--check-ours", default=False):
        return lambda case, problem, ours, _: run(case, problem, ours, {})
    return run


@pytest.fixture
def store(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """`store(op, step, shape, figures, rate)`: the record of what is no op and has no peers, after it ran.

    `rate` names an amount, such as {"tokens": 4096}: tokens/s of the median go into the record.
    """

    def run(op: str, step: str, shape: str, figures: dict[str, Any], rate: dict[str, float]) -> None:
        names = {"op": op, "step": step, "shape": shape, "device": device_name(torch.device("cpu"))}
        benchmark.extra_info.update(names, method="wall", has_kernel=False, peers={}, **figures)
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            benchmark.extra_info["us"] = float(f"{seconds * 1e6:.4g}")
            rates = {f"{name}/s": float(f"{amount / seconds:.4g}") for name, amount in rate.items()}
            benchmark.extra_info.update(rates)

    return run


@pytest.fixture(autouse=True)
def shown(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[None]:
    """Writes the figures of a benchmark as soon as it is done."""
    yield
    if not benchmark.disabled:
        kept = benchmark.extra_info
        figures = [f"{name} {kept[name]}" for name in SHOWN if name in kept]
        figures += [
            f"{name} {peer['ratio']}x" if "ratio" in peer else f"{name} failed ({peer['error']})"
            for name, peer in kept.get("peers", {}).items()
        ]
        name = request.node.nodeid.rpartition("/")[2].removeprefix("bench_")
        sys.stdout.write(f"\n{name}: {', '.join(figures)}\n")


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


@pytest.fixture(scope="module")
def first_calls(request: pytest.FixtureRequest) -> Iterator[Aside]:
    """The other process of a file, for first calls of kernels that may hang, of LIMIT_S each."""
    found = Aside(gpu.wake, limit_s=request.module.LIMIT_S)
    yield found
    found.close()


@pytest.fixture
def aside(first_calls: Aside) -> Aside:
    """The same, until something has hung there."""
    if first_calls.num_hung:
        pytest.fail("not measured: a case ahead of this one hung")
    return first_calls
