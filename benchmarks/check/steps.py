"""The steps after the build: tests, compute-sanitizer, benchmarks; each within its share of the budget."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.check.events import Seen, read_events
from benchmarks.check.process import Budget, Ended, Runner
from benchmarks.check.record import Record
from benchmarks.check.sanitizer import ENVIRONMENT, TOOLS, Verdict, judge, sanitizer_command
from benchmarks.reporting.targets import read_targets

# The share of the budget at whose end a step must be over; what one leaves, the next has.
SHARES = {"build": 0.35, "tests": 0.60, "sanitizers": 0.80, "benchmarks": 0.98}
GPU_TESTS = "tests/gpu"
OURS_SHARE = 0.6  # of what benchmarks have, for the run without peers
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

    Ops with targets come first, in the order of targets.json: what is cut is cut from the end. Last come
    files beyond an op's own, whose kernels may hang. ValueError for an op that has no GPU tests.
    """
    tests = {path.stem.removeprefix("test_"): path for path in sorted((root / GPU_TESTS).glob("test_*.py"))}
    known = {
        path.stem.removeprefix("bench_"): path for path in sorted((root / "benchmarks").glob("bench_*.py"))
    }
    strangers = [op for op in ops if op not in tests]
    if strangers:
        raise ValueError(f"OPS must name ops with GPU tests ({', '.join(tests)}), got {', '.join(strangers)}")
    chosen = [name for name in tests if not ops or any(name == op or name.startswith(f"{op}_") for op in ops)]
    targets = list(dict.fromkeys(target.op for target in read_targets()))
    chosen.sort(
        key=lambda name: (is_beyond(name, tests), targets.index(name) if name in targets else len(targets))
    )
    return Plan(
        tests={name: str(tests[name].relative_to(root)) for name in chosen},
        benchmarks={name: str(known[name].relative_to(root)) for name in chosen if name in known},
    )


def is_beyond(name: str, names: Iterable[str]) -> bool:
    """Whether `name` is <op>_<more> of an op among `names`."""
    return any(name.startswith(f"{op}_") for op in names)


def does_not_apply(check: Check, name: str, ended: Ended, seen: Seen) -> bool:
    """Whether all of a file beyond an op's own was skipped: it is about another GPU, its op's file is not."""
    outcomes = {outcome for outcome, count in seen.counts.items() if count}
    return is_beyond(name, check.plan.tests) and ended.code == 0 and outcomes == {"skipped"}


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
    """Every GPU test, a process a file: a fault takes its own file's tests down, not the others'.

    Files beyond an op's own run when all the others are done: a kernel that hangs would slow them down.
    """

    def run(op: str) -> str:
        ended, seen = pytest_run(
            check,
            f"test-{op}",
            [check.plan.tests[op], "-m", "gpu"],
            limit=check.budget.until(SHARES["tests"]),
        )
        outcome, note = tests_outcome(ended, seen)
        if does_not_apply(check, op, ended, seen):
            outcome, note = "does not apply", next(iter(seen.skips), "")
        check.record.add_tests(op, seen.counts, seen.failures)
        check.record.add_step(f"tests {op}", outcome, ended.seconds, note)
        return outcome

    names = list(check.plan.tests)
    beyond = [name for name in names if is_beyond(name, names)]
    with ThreadPoolExecutor(num_parallel(4)) as pool:
        outcomes = list(pool.map(run, [name for name in names if name not in beyond]))
        return worst([*outcomes, *pool.map(run, beyond)])


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


def sanitizer_runs(ops: Sequence[str]) -> list[tuple[str, str]]:
    """(op, tool): all ops under the tool that finds most, then under the next."""
    return [(op, tool) for tool in TOOLS for op in ops]


def run_sanitizers(check: Check, program: str | None) -> str:
    """The small set marked `sanitize`, under each tool of compute-sanitizer."""
    pairs = sanitizer_runs(list(check.plan.tests))
    if program is None:
        absent = Verdict(outcome="not available", note="compute-sanitizer was not found")
        for op, tool in pairs:
            check.record.add_sanitizer(op, tool, asdict(absent))
        check.record.add_step("sanitizers", absent.outcome, 0.0, absent.note)
        return absent.outcome

    def run(pair: tuple[str, str]) -> str:
        op, tool = pair
        ended, seen = pytest_run(
            check,
            f"{tool}-{op}",
            [check.plan.tests[op], "-m", "gpu and sanitize", f"--check-tool={tool}"],
            limit=check.budget.until(SHARES["sanitizers"]),
            wrap=lambda command: sanitizer_command(program, tool, command),
        )
        verdict = judge(tool, ended.output, ended.code, seen)
        if does_not_apply(check, op, ended, seen):
            verdict = Verdict(outcome="does not apply", note=next(iter(seen.skips), ""))
        check.record.add_sanitizer(op, tool, asdict(verdict))
        check.record.add_step(f"{tool} {op}", verdict.outcome, ended.seconds, verdict.note)
        return verdict.outcome

    with ThreadPoolExecutor(num_parallel(2)) as pool:
        return worst(list(pool.map(run, pairs)))


def run_benchmarks(check: Check) -> str:
    """Ours alone on every case, in one process; then op by op beside the peers. Nothing else is on the GPU.

    Peers compile and tune for seconds a shape: that time must not be missing for our own results. Beside the
    peers each op has an equal part of what is left.
    """
    if not check.plan.benchmarks:
        check.record.add_step("benchmarks", "passed", 0.0, "none of these ops has any")
        return "passed"
    limit = OURS_SHARE * check.budget.until(SHARES["benchmarks"])
    outcomes = [measure_files(check, "ours", list(check.plan.benchmarks.values()), ["--check-ours"], limit)]
    for done, (op, file) in enumerate(check.plan.benchmarks.items()):
        left = check.budget.until(SHARES["benchmarks"])
        outcomes.append(measure_files(check, op, [file], [], left / (len(check.plan.benchmarks) - done)))
    return worst(outcomes)


def measure_files(check: Check, name: str, files: Sequence[str], options: Sequence[str], limit: float) -> str:
    """One process that runs benchmarks; what it measured until `limit` is kept."""
    if limit < MIN_BENCHMARK_S:
        check.record.add_step(f"benchmarks {name}", "cut", 0.0, f"only {limit:.0f} s of the budget were left")
        return "cut"
    arguments = [*files, "--benchmark-enable", "--benchmark-only", *options]
    ended, seen = pytest_run(check, f"bench-{name}", arguments, limit=limit)
    check.record.add_benchmarks(seen.measured)
    outcome, note = benchmarks_outcome(ended, seen)
    if does_not_apply(check, name, ended, seen):
        outcome, note = "does not apply", next(iter(seen.skips), "")
    check.record.add_step(f"benchmarks {name}", outcome, ended.seconds, note)
    return outcome


def benchmarks_outcome(ended: Ended, seen: Seen) -> tuple[str, str]:
    """Results are kept whether or not all were reached."""
    if seen.num_bad:
        first = seen.failures[0]
        return "failed", f"{first['test']}: {first['reason']}"
    if ended.code is None:
        return "cut", f"{len(seen.measured)} of {seen.num_collected} results until its limit"
    if ended.code != 0 or not seen.measured:
        return "failed", f"pytest ended with {ended.code}, {len(seen.measured)} results"
    return "passed", f"{len(seen.measured)} results"


# From worst to best. A check fails with the first four; with the next four it did not show all.
ORDER = (
    "failed",
    "found",
    "tests failed",
    "broken",
    "nothing ran",
    "stopped",
    "cut",
    "not available",
    "does not apply",
    "passed",
)
FAILED = ORDER[:4]
UNFINISHED = ORDER[4:8]


def worst(outcomes: Sequence[str]) -> str:
    """The worst of several outcomes; of none at all, that nothing ran."""
    return min(outcomes, key=ORDER.index, default="nothing ran")
