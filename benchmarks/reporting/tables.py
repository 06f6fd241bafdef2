"""One device's report in Markdown: what ran, the targets, and every op's results."""

import re
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.reporting.records import Key, Result, Run, newest_results
from benchmarks.reporting.targets import place_of, read_targets, slower, standings

PLOTS = ("roofline.png", "ratios.png")
TOOL_NAMES = ("memcheck", "synccheck", "racecheck")
HEADS = {
    "us": "us",
    "call_us": "us of a call",
    "tokens/s": "tokens/s",
    "TFLOP/s": "TFLOP/s",
    "GB/s": "GB/s",
    "share": "% of ceiling",
}
NUMBER = re.compile(r"[\d,]+(\.\d+)?|failed")  # a peer that failed stands among numbers


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; figures in any but the first column stand to the right."""
    rows = list(rows)
    rule = ["---"]
    for column in range(1, len(header)):
        cells = [row[column] for row in rows if row[column]]
        is_number = bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells)
        rule.append("---:" if is_number else "---")
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def device_report(runs: Sequence[Run], accepted: Mapping[Key, float]) -> str:
    """The whole page."""
    newest = newest_results(runs)
    results = [result for result, _ in newest.values()]
    last = runs[-1]
    device = str(last.machine["device"])
    sections = [
        f"# {device}",
        "Written by `python -m benchmarks.report` from the runs stored beside it. "
        "docs/benchmarks.md says how they were measured.",
        _run_line(last),
        _checks(runs),
        _targets(results, device),
        _slower_section(slower(results, accepted)),
        "\n\n".join(f"![{name.partition('.')[0]}]({name})" for name in PLOTS) if results else "",
        *(_op_section(op, newest) for op in sorted({str(result["op"]) for result in results})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _run_line(run: Run) -> str:
    versions = [f"torch {run.machine.get('torch')}", f"python {run.machine.get('python')}"]
    versions += [f"{name} {run.machine[name]}" for name in ("cuda", "driver") if run.machine.get(name)]
    cut = "" if run.is_complete else "; cut short"
    return f"Newest run: {run.started}, commit {run.commit}, {', '.join(versions)}{cut}."


def _checks(runs: Sequence[Run]) -> str:
    """The newest check of every op."""
    newest = {op: run for run in runs if run.is_check for op in run.tests}
    rows = []
    for op, run in sorted(newest.items()):
        tools = run.sanitizers.get(op, {})
        found = [str(tools.get(tool, {}).get("outcome", "not run")) for tool in TOOL_NAMES]
        rows.append((f"`{op}`", counted(run.tests[op]), *found, run.day, run.commit))
    if not rows:
        return ""
    return "## Checks\n\n" + markdown(["op", "tests", *TOOL_NAMES, "day", "commit"], rows)


def counted(counts: Mapping[str, int]) -> str:
    """As in `12 passed, 1 failed`."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()) if number) or "none"


def _targets(results: Sequence[Result], device: str) -> str:
    rows = []
    for standing in standings(read_targets(), results, device):
        target, result = standing.target, standing.result
        got = f"{target.value(result):g}" if result else ""
        case = place_of(result) if result else ""
        rows.append(
            (target.name, target.unit, f"{target.must:g}", f"{target.aim:g}", got, standing.verdict, case)
        )
    if not rows:
        return ""
    header = ["target", "unit", "must", "aim", "slowest", "verdict", "where"]
    return "## Targets\n\n" + markdown(header, rows)


def _slower_section(found: Mapping[Key, float]) -> str:
    rows = [(" ".join(part for part in key if part), f"{ratio:.2f}") for key, ratio in sorted(found.items())]
    if not rows:
        return ""
    return "## Over 5 % slower than accepted\n\n" + markdown(["result", "times the accepted time"], rows)


def _op_section(op: str, newest: Mapping[Key, tuple[Result, Run]]) -> str:
    """One row a result, one column a peer: its time over ours, more than 1 where ours is quicker."""
    found = [(result, run) for result, run in newest.values() if result["op"] == op]
    found.sort(
        key=lambda pair: tuple(pair[0].get(name, "") for name in ("model", "shape", "step", "routing"))
    )
    peers = sorted({name for result, _ in found for name in result.get("peers", {})})
    figures = [name for name in HEADS if any(name in result for result, _ in found)]
    header = ["shape", "model", "routing", "step", "dtype", *(HEADS[name] for name in figures), "bound", "by"]
    rows = [
        [
            *(str(result.get(name, "")) for name in ("shape", "model", "routing", "step", "dtype")),
            *(_figure(result, name) for name in figures),
            str(result.get("bound", "")),
            "kernel" if result.get("has_kernel") else "reference",
            *(_ratio(result, name) for name in peers),
            run.day,
        ]
        for result, run in found
    ]
    failed = sorted(
        {
            f"- {name}: {peer['error']}"
            for result, _ in found
            for name, peer in result.get("peers", {}).items()
            if "error" in peer
        }
    )
    table = markdown([*header, *(f"{name} / ours" for name in peers), "day"], rows)
    note = "\n\nPeers that did not run:\n\n" + "\n".join(failed) if failed else ""
    return f"## {op}\n\n{table}{note}"


def _figure(result: Result, name: str) -> str:
    """Four digits, and no powers of ten."""
    if name not in result:
        return ""
    value = float(result[name])
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _ratio(result: Result, name: str) -> str:
    peer = result.get("peers", {}).get(name, {})
    return f"{peer['ratio']:.2f}" if "ratio" in peer else ("failed" if "error" in peer else "")


def label(result: Result) -> str:
    """A result in a few words, for plots."""
    parts = (result["op"], result["step"], result.get("model"), result.get("routing"), result["shape"])
    return " ".join(str(key) for key in parts if key)
