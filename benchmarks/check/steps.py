"""The steps after the build: tests, compute-sanitizer, benchmarks; each within its share of the budget."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.check.events import Seen, read_events
from benchmarks.check.process import Budget, Ended, Runner
from benchmarks.check.record import Record
from benchmarks.check.sanitizer import ENVIRONMENT, TOOLS, Verdict, judge, sanitizer_command

# The share of the budget at whose end a step must be over; what one leaves, the next has.
SHARES = {"build": 0.35, "tests": 0.60, "sanitizers": 0.80, "benchmarks": 0.98}
GPU_TESTS = "tests/gpu"
MIN_BENCHMARK_S = 15.0  # torch, the kernels and the first flush of L2 take about this long


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is checked: files of tests, and of benchmarks, by the op they are about."""

    tests: dict[str, str]
    benchmarks: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What every step works with."""

    runner: Runner
    budget: Budget
    record: Record
    plan: Plan


def make_plan(root: Path, ops: Sequence[str]) -> Plan:
    """The files about `ops`, test_<op>.py and test_<op>_*.py; without any, all there are.

    ValueError for an op that has no GPU tests.
    """
    tests = {path.stem.removeprefix("test_"): path for path in sorted((root / GPU_TESTS).glob("test_*.py"))}
    known = {
        path.stem.removeprefix("bench_"): path for path in sorted((root / "benchmarks").glob("bench_*.py"))
    }
    strangers = [op for op in ops if op not in tests]
    if strangers:
        raise ValueError(f"OPS must name ops with GPU tests ({', '.join(tests)}), got {', '.join(strangers)}")
    chosen = [name for name in tests if not ops or any(name == op or name.startswith(f"{op}_") for op in ops)]
    return Plan(
        tests={name: str(tests[name].relative_to(root)) for name in chosen},
        benchmarks={name: str(known[name].relative_to(root)) for name in chosen if name in known},
    )


def pytest_run(
    check: Check,
    name: str,
    arguments: Sequence[str],
    *,
    limit: float,
    wrap: Callable[[list[str]], list[str]] = list,
) -> tuple[Ended, Seen]:
    """Run pytest with the plugin that notes every outcome; `wrap` puts a program in front of it."""
    events = check.runner.logs / f"{name}.jsonl"
    events.unlink(missing_ok=True)
    plugin = ["-p", "no:cacheprovider", "-p", "benchmarks.check.plugin", f"--check-events={events}"]
    command = wrap([sys.executable, "-m", "pytest", *arguments, *plugin])
    environment = ENVIRONMENT if wrap is not list else {}
    ended = check.runner.run(command, name=name, limit=limit, environment=environment)
    return ended, read_events(events, is_stopped=ended.code is None)


def num_parallel(cores_each: int) -> int:
    """How many processes that use `cores_each` cores run side by side."""
    return max(1, min(8, (os.cpu_count() or 1) // cores_each))


def run_tests(check: Check) -> str:
    """Every GPU test, a process a file: a fault takes its own file's tests down, not the others'."""

    def run(op: str) -> str:
        ended, seen = pytest_run(
            check,
            f"test-{op}",
            [check.plan.tests[op], "-m", "gpu"],
            limit=check.budget.until(SHARES["tests"]),
        )
        outcome, note = tests_outcome(ended, seen)
        check.record.add_tests(op, seen.counts, seen.failures)
        check.record.add_step(f"tests {op}", outcome, ended.seconds, note)
        return outcome

    with ThreadPoolExecutor(num_parallel(4)) as pool:
        return worst(list(pool.map(run, check.plan.tests)))


def tests_outcome(ended: Ended, seen: Seen) -> tuple[str, str]:
    """A run passes if its tests passed, at least one ran, and pytest came to its own end."""
    if seen.num_bad:
        first = seen.failures[0]
        return "failed", f"{first['test']}: {first['reason']}"
    if ended.code is None:
        return "stopped", "did not end within its limit"
    if not seen.counts.get("passed"):
        reason = next(iter(seen.skips), "") or " ".join(ended.output.strip().splitlines()[-1:])
        return "failed", f"nothing ran: {reason}"
    if ended.code != 0 or not seen.is_finished:
        return "failed", f"pytest ended with {ended.code}: {' '.join(ended.output.strip().splitlines()[-1:])}"
    return "passed", ""


def run_sanitizers(check: Check, program: str | None) -> str:
    """The small set marked `sanitize`, under each tool of compute-sanitizer."""

    def run(pair: tuple[str, str]) -> str:
        op, tool = pair
        verdict, seconds = Verdict(outcome="not available", note="compute-sanitizer was not found"), 0.0
        if program is not None:
            ended, seen = pytest_run(
                check,
                f"{tool}-{op}",
                [check.plan.tests[op], "-m", "gpu and sanitize", f"--check-tool={tool}"],
                limit=check.budget.until(SHARES["sanitizers"]),
                wrap=lambda command: sanitizer_command(program, tool, command),
            )
            verdict, seconds = judge(tool, ended.output, ended.code, seen), ended.seconds
        check.record.add_sanitizer(op, tool, asdict(verdict))
        check.record.add_step(f"{tool} {op}", verdict.outcome, seconds, verdict.note)
        return verdict.outcome

    pairs = [(op, tool) for op in check.plan.tests for tool in TOOLS]
    with ThreadPoolExecutor(num_parallel(2)) as pool:
        return worst(list(pool.map(run, pairs)))


def run_benchmarks(check: Check) -> str:
    """One op after the other, alone on the GPU; each has an equal part of what is left."""
    outcomes = []
    for done, (op, file) in enumerate(check.plan.benchmarks.items()):
        left = check.budget.until(SHARES["benchmarks"])
        limit = left / (len(check.plan.benchmarks) - done)
        if limit < MIN_BENCHMARK_S:
            outcomes.append("cut")
            check.record.add_step(
                f"benchmarks {op}", "cut", 0.0, f"only {left:.0f} s of the budget were left"
            )
            continue
        arguments = [file, "--benchmark-enable", "--benchmark-only"]
        ended, seen = pytest_run(check, f"bench-{op}", arguments, limit=limit)
        check.record.add_benchmarks(seen.measured)
        outcome, note = benchmarks_outcome(ended, seen)
        outcomes.append(outcome)
        check.record.add_step(f"benchmarks {op}", outcome, ended.seconds, note)
    return worst(outcomes)


def benchmarks_outcome(ended: Ended, seen: Seen) -> tuple[str, str]:
    """Results are kept whether or not all were reached."""
    if seen.num_bad:
        first = seen.failures[0]
        return "failed", f"{first['test']}: {first['reason']}"
    if ended.code is None:
        return "cut", f"{len(seen.measured)} results until its limit"
    if ended.code != 0 or not seen.measured:
        return "failed", f"pytest ended with {ended.code}, {len(seen.measured)} results"
    return "passed", f"{len(seen.measured)} results"


# From worst to best. A check fails with the first four; with the next two it did not show what it should.
ORDER = (
    "failed",
    "found",
    "tests failed",
    "broken",
    "nothing ran",
    "stopped",
    "cut",
    "not available",
    "passed",
)
FAILED = ORDER[:4]
UNFINISHED = ORDER[4:6]


def worst(outcomes: Sequence[str]) -> str:
    """The worst of several outcomes; of none at all, that nothing ran."""
    return min(outcomes, key=ORDER.index, default="nothing ran")
