"""Build dscoder here, run its GPU tests, compute-sanitizer and the benchmarks, and record what happened.

`make gpu-check [OPS="moe_gate ..."]`, or `python -m benchmarks.gpu_check [op ...]`. Needs no network and
installs nothing. See docs/gpu_check.md.

Exit status: 0 all was run and is well, 1 something failed or a sanitizer found something, 2 nothing was
checked, 3 nothing failed, but not all was run: the record says what is missing.
"""

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.check.build import FOLDER, ROOT, SITE, build, find_objects, try_import, unpack_wheels
from benchmarks.check.machine import describe, find_sanitizer, toolkit_environment
from benchmarks.check.process import Budget, Runner
from benchmarks.check.record import Record
from benchmarks.check.steps import (
    FAILED,
    SHARES,
    UNFINISHED,
    Check,
    make_plan,
    run_benchmarks,
    run_sanitizers,
    run_tests,
)
from benchmarks.reporting.records import RESULTS, run_file
from benchmarks.reporting.summary import summarize

REFUSED = 2
NUM_STEPS = 4  # build, tests, sanitizers, benchmarks
MAX_NOTE = 1000  # characters of what a failed build said last
MAX_LOG = 200_000  # characters of one log that are kept in --out


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="check these alone (default: every op with GPU tests)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all (default: 540)")
    parser.add_argument(
        "--objects",
        type=Path,
        help="link the kernels of this folder (default: build/kernel-objects if they fit)",
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of packages that this machine lacks")
    parser.add_argument("--installed", action="store_true", help="check the installed dscoder, build nothing")
    parser.add_argument("--commit", help="the commit of these sources, where git cannot tell")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are kept")
    parser.add_argument("--out", type=Path, help="a folder for a copy of the record, and the logs")
    return parser.parse_args(argv)


def main(argv: Sequence[str], *, root: Path = ROOT) -> int:
    """Run the steps on the tests and benchmarks below `root`; the exit status."""
    arguments = parse(argv)
    budget, begin = Budget(arguments.budget), datetime.now(UTC)
    environment = toolkit_environment(os.environ)
    places = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    runner = Runner(root, root / FOLDER / "logs", {**environment, "PYTHONPATH": os.pathsep.join(places)})
    try:
        plan = make_plan(root, arguments.ops)
        if arguments.wheels:
            wheels = unpack_wheels(runner, arguments.wheels.resolve(), budget.until(SHARES["build"]))
            places.insert(0, str(wheels))
            runner.environment["PATH"] = os.pathsep.join((str(wheels / "bin"), environment.get("PATH", "")))
        if not arguments.installed:
            places.insert(0, str(SITE))
        runner.environment["PYTHONPATH"] = os.pathsep.join(places)
        machine = describe(root, runner.environment)
    except ValueError as error:
        return refuse(str(error))
    if machine["device"] is None:
        return refuse(
            f"torch {machine['torch']} finds no NVIDIA GPU on this machine; nothing was built or checked"
        )
    machine["commit"] = machine["commit"] or arguments.commit
    path = run_file(root / arguments.results, machine["device"], begin)
    copies = [arguments.out / "gpu-check.json"] if arguments.out else []
    record = Record(
        [path, *copies],
        machine,
        ops=list(plan.tests),
        begin=begin,
        announce=sys.stderr.write,
    )
    check = Check(runner=runner, budget=budget, record=record, plan=plan)
    stop_with(runner)
    outcomes = run_steps(check, arguments, tuple(machine["capability"]))
    is_over = len(outcomes) == NUM_STEPS and not runner.is_stopped
    missing = missing_from(record.data["steps"], is_over=is_over)
    record.end(budget.spent(), missing)
    if arguments.out:
        gather_logs(runner.logs, arguments.out / "gpu-check.log")
    sys.stdout.write(summarize(record.data, path.parent))
    return exit_status(outcomes, missing)


def run_steps(check: Check, arguments: argparse.Namespace, capability: tuple[int, int]) -> list[str]:
    """The outcome of each step; after a failed build there are no others."""
    outcome, seconds, note = build_or_find(check, arguments, capability)
    check.record.add_step("build", outcome, seconds, note)
    if outcome != "passed":
        return [outcome]
    sanitizer = find_sanitizer(check.runner.environment)
    return [outcome, run_tests(check), run_sanitizers(check, sanitizer), run_benchmarks(check)]


def build_or_find(
    check: Check, arguments: argparse.Namespace, capability: tuple[int, int]
) -> tuple[str, float, str]:
    """Outcome, seconds and a word on the dscoder that is checked."""
    seconds, site = 0.0, None
    if not arguments.installed:
        site = SITE
        limit = check.budget.until(SHARES["build"])
        try:
            objects = arguments.objects.resolve() if arguments.objects else find_objects(check.runner, limit)
            ended = build(check.runner, capability=capability, objects=objects, limit=limit)
        except ValueError as error:
            return "failed", seconds, str(error)
        seconds = ended.seconds
        if ended.code != 0:
            return "failed", seconds, first_error(ended.output)
    limit = check.budget.until(SHARES["build"])
    ended = try_import(check.runner, capability=capability, site=site, limit=limit)
    if ended.code != 0:
        return "failed", seconds + ended.seconds, first_error(ended.output)
    return "passed", seconds + ended.seconds, ended.output.strip().splitlines()[-1]


def first_error(output: str) -> str:
    """What a failed command said from its first error on, on one line; from its end if it named none."""
    lines = output.strip().splitlines()
    begin = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 6))
    return " ".join(" ".join(lines[begin:]).split())[:MAX_NOTE]


def missing_from(steps: Sequence[Mapping[str, Any]], *, is_over: bool) -> list[str]:
    """Steps that were cut, stopped or not to be had, and the end if it was not reached."""
    missing = [f"{step['name']}: {step['outcome']}" for step in steps if step["outcome"] in UNFINISHED]
    return missing if is_over else [*missing, "the check did not come to its end"]


def exit_status(outcomes: Sequence[str], missing: Sequence[str]) -> int:
    """1 for what failed, else 3 for what is missing."""
    if any(outcome in FAILED for outcome in outcomes):
        return 1
    return 3 if missing else 0


def refuse(reason: str) -> int:
    """Say why nothing was checked."""
    sys.stderr.write(f"gpu-check: {reason}\n")
    return REFUSED


def stop_with(runner: Runner) -> None:
    """SIGTERM and SIGINT end the commands; the steps then end, one after the other, with what they have."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        runner.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def gather_logs(folder: Path, target: Path) -> None:
    """The ends of all logs in one file, which is easier to carry than many."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for log in sorted(folder.glob("*.log")):
            file.write(
                f"==== {log.name} ====\n{log.read_text(encoding='utf-8', errors='replace')[-MAX_LOG:]}\n"
            )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
