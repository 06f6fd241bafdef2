"""Short Python programs through the sandbox, each fully isolated.

Wanted: at least 40 a second on two cores, no fewer than the harness of HumanEval runs without isolation, and
a start within 40 ms of the bare interpreter's. Processor time a program is stored as well: on a machine that
is busy with other work it says more than the clock.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.peers.exec_harness import check_many, cpu_seconds, run_in_own_process
from dscoder.sandbox.pool import Pool
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits, Program

NUM_PROGRAMS = 24
NUM_ROUNDS = 3
NUM_STARTS = 30
CPU = "ms of processor a program"
LIMITS = Limits()
# A function and its unit tests, as HumanEval has them.
SOURCE = """
def below_zero(operations):
    balance = 0
    for operation in operations:
        balance += operation
        if balance < 0:
            return True
    return False

def check(candidate):
    assert candidate([]) == False
    assert candidate([1, 2, -3, 1, 2, -3]) == False
    assert candidate([1, 2, -4, 5, 6]) == True

check(below_zero)
"""
SOURCES = [f"{SOURCE}\nassert {i} == {i}\n" for i in range(NUM_PROGRAMS)]

Store = Callable[..., None]


def run_all() -> None:
    """Every program through a pool; as many at a time as the harness takes."""
    with Pool(num_workers=4) as pool:
        for verdict in pool.run_many((Program(source=source) for source in SOURCES), LIMITS):
            assert verdict.outcome == "passed", verdict.detail


@pytest.fixture(autouse=True)
def working_sandbox() -> None:
    """Skips where the sandbox cannot work, with its reason."""
    verdict = run(Program(source="pass"))
    if not verdict.is_answer:
        pytest.skip(verdict.detail)


def measure(benchmark: BenchmarkFixture, action: Callable[[], object]) -> dict[str, float]:
    """Times an action that runs all programs; the processor time of one."""
    used = cpu_seconds()
    benchmark.pedantic(action, rounds=NUM_ROUNDS)
    num_rounds = 1 if benchmark.disabled else NUM_ROUNDS
    return {CPU: round((cpu_seconds() - used) / (num_rounds * NUM_PROGRAMS) * 1e3, 1)}


def test_programs(benchmark: BenchmarkFixture, store: Store) -> None:
    figures = measure(benchmark, run_all)
    store("sandbox", "full isolation", f"programs={NUM_PROGRAMS}", figures, {"programs": NUM_PROGRAMS})


def test_harness_in_its_own_process(benchmark: BenchmarkFixture, store: Store) -> None:
    seen: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: seen.append(run_in_own_process(SOURCES)), rounds=NUM_ROUNDS)
    wall, cpu = (statistics.median(values) for values in zip(*seen, strict=True))
    # The process's own start is no part of it.
    figures = {"programs/s": round(NUM_PROGRAMS / wall, 1), CPU: round(cpu / NUM_PROGRAMS * 1e3, 1)}
    store("sandbox", "exec harness, own process", f"programs={NUM_PROGRAMS}", figures, {})


def test_harness_beside_torch(benchmark: BenchmarkFixture, store: Store) -> None:
    """As a trainer would: forking a process that has torch loaded."""
    assert "torch" in sys.modules
    figures = measure(benchmark, lambda: check_many(SOURCES))
    rate = {"programs": NUM_PROGRAMS}
    store("sandbox", "exec harness, beside torch", f"programs={NUM_PROGRAMS}", figures, rate)


def milliseconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


def test_start(benchmark: BenchmarkFixture, store: Store) -> None:
    program = Program(source="pass")
    bare = [str(Path(sys.executable).resolve()), "-I", "-S", "-c", "pass"]
    pairs = [
        (milliseconds(lambda: run(program)), milliseconds(lambda: subprocess.run(bare, check=True)))
        for _ in range(NUM_STARTS)
    ]
    sandboxed, alone = zip(*pairs, strict=True)
    benchmark.pedantic(run, (program,), rounds=NUM_STARTS)
    figures = {
        "ms above the bare interpreter, fastest": round(min(sandboxed) - min(alone), 1),
        "median": round(statistics.median(sandboxed) - statistics.median(alone), 1),
    }
    store("sandbox", "start", "programs=1", figures, {})
