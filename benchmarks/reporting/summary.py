"""The short table that a GPU check ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting.records import Result, is_result, key_of
from benchmarks.reporting.targets import (
    best_peer,
    place_of,
    read_accepted,
    read_targets,
    slower,
    standings,
)

MAX_FAILURES = 12
MAX_STEPS = 24
MAX_MISSING = 12
MAX_NOTE = 140


def summarize(data: Mapping[str, Any], folder: Path) -> str:
    """The record of a check as short text; `folder` holds its device's accepted times."""
    results = [record for record in data["benchmarks"] if is_result(record)]
    state = "complete" if data["is_complete"] else "INCOMPLETE"
    head = (
        f"gpu-check {data['started']}: {data['device']}, commit {(data['commit'] or 'unknown')[:9]}"
        f"{' with changes' if data['is_dirty'] else ''}, torch {data['torch']}, python {data['python']}, "
        f"{data['seconds']:.0f} s, {state}"
    )
    sections = [
        _missing(data["missing"]),
        _steps(data["steps"]),
        _ops(data),
        _targets(results, data["device"]),
        _slower(results, folder),
        _failures(data["failures"]),
    ]
    return "\n\n".join([head, *(section for section in sections if section)]) + "\n"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, columns aligned; the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    """What did not pass, and what has something to say; the table of ops has the rest."""
    shown = [step for step in steps if step["outcome"] != "passed" or step.get("note")]
    rows = [
        (step["name"], step["outcome"], f"{step['seconds']:.1f} s", str(step.get("note", ""))[:MAX_NOTE])
        for step in shown[:MAX_STEPS]
    ]
    if len(shown) > MAX_STEPS:
        rows.append((f"and {len(shown) - MAX_STEPS} more", "see the JSON", "", ""))
    return columns([("step", "outcome", "took", "note"), *rows])


def _missing(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    rest = f", and {len(missing) - MAX_MISSING} more" if len(missing) > MAX_MISSING else ""
    return f"NOT SHOWN: {', '.join(missing[:MAX_MISSING])}{rest}"


def _ops(data: Mapping[str, Any]) -> str:
    rows = []
    for op in data["ops"]:
        tests = ", ".join(f"{number} {kind}" for kind, number in data["tests"].get(op, {}).items())
        tools = data["sanitizers"].get(op, {})
        found = [
            tools.get(tool, {}).get("outcome", "not run") for tool in ("memcheck", "synccheck", "racecheck")
        ]
        best = _best(
            [record for record in data["benchmarks"] if record.get("op") == op and is_result(record)]
        )
        rows.append((op, tests or "not run", *found, best))
    return columns(
        [("op", "tests", "memcheck", "synccheck", "racecheck", "best share of the ceiling"), *rows]
    )


def _best(results: Sequence[Result]) -> str:
    """The result nearest to its ceiling, and its nearest peer."""
    result = max(
        (one for one in results if "share" in one), key=lambda one: float(one["share"]), default=None
    )
    if result is None:
        return "not measured"
    peer = best_peer(result)
    beside = f", {peer[0]} / ours {peer[1]:.2f}" if peer else ""
    kernel = "" if result.get("has_kernel") else " (reference)"
    return (
        f"{result['share']:.0f} %: {result['step']} {result['shape']}, {result['us']:.1f} us{beside}{kernel}"
    )


def _targets(results: Sequence[Result], device: str) -> str:
    rows = []
    for standing in standings(read_targets(), results, device):
        target, result = standing.target, standing.result
        got = f"{target.value(result):g} ({place_of(result)})" if result else ""
        wanted = f"{target.unit}: must {target.must:g}, aim {target.aim:g}"
        rows.append((target.name, wanted, standing.verdict, got))
    return columns([("target", "wanted", "verdict", "slowest"), *rows]) if rows else ""


def _slower(results: Sequence[Result], folder: Path) -> str:
    try:
        found = slower(results, read_accepted(folder))
    except ValueError as error:
        return f"NOT COMPARED with accepted times: {error}"
    times = {key_of(result): result["us"] for result in results}
    rows = [
        (" ".join(part for part in key if part), f"{times[key]:.1f} us", f"{found[key]:.2f}x")
        for key in found
    ]
    return columns([("SLOWER than accepted", "took", "of accepted"), *rows[:20]]) if rows else ""


def _failures(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return ""
    lines = [f"{failure['test']}: {failure['reason'][:MAX_NOTE]}" for failure in failures[:MAX_FAILURES]]
    if len(failures) > MAX_FAILURES:
        lines.append(f"and {len(failures) - MAX_FAILURES} more, see the JSON")
    return "\n".join([f"{len(failures)} FAILED", *lines])
