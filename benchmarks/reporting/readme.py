"""What the README shows of the results: the table of ops, and the plots of the GPU that was measured last.

The table says of each op what it computes, what runs it, and when that last ran on a GPU.
"""

import ast
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from benchmarks.reporting.records import Run, newest_results
from benchmarks.reporting.tables import PLOTS, TOOL_NAMES, counted, markdown
from benchmarks.reporting.targets import best_peer

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
ARCHS = "sm_80, sm_90a"  # the default of DSCODER_CUDA_ARCHS
DEFINES = "\ndefine_op("  # what a file of python/dscoder/ops calls that holds an op
EXCHANGE = "expert_parallel"  # the op that is a class; torch knows none of its steps


def generated(root: Path, kernel_ops: Collection[str], runs: Sequence[Run]) -> str:
    """What stands between the markers; `runs` are those on GPUs, the oldest first."""
    return "\n\n".join(filter(None, [ops_table(root, kernel_ops, runs), plots_of_newest(root, runs)]))


def plots_of_newest(root: Path, runs: Sequence[Run]) -> str:
    """The plots of the GPU that was measured last, as report.py writes them; "" while none was."""
    measured = [run for run in runs if run.results]
    if not measured:
        return ""
    newest = measured[-1]
    folder = newest.path.parent.relative_to(root).as_posix()
    links = [f"![{name.partition('.')[0]} of {newest.machine['device']}]({folder}/{name})" for name in PLOTS]
    title = f"Results on {newest.machine['device']}, all of them in [its report]({folder}/report.md):"
    return "\n\n".join([title, *links])


def ops_table(root: Path, kernel_ops: Collection[str], runs: Iterable[Run]) -> str:
    """One row an op of python/dscoder/ops; `runs` are those on GPUs, the oldest first."""
    runs = list(runs)
    rows = []
    for file in op_files(root):
        op = file.stem
        kernel = ARCHS if op in kernel_ops else "not yet"
        ran = last_run(op, runs) if op in kernel_ops else ""
        on_cpu = "collectives" if op == EXCHANGE else "reference"
        rows.append((f"[`{op}`](docs/{op}.md)", summary_of(file), on_cpu, kernel, ran))
    return markdown(["op", "computes", "CPU", "CUDA kernel", "last run on a GPU"], rows)


def op_files(root: Path) -> list[Path]:
    """The files of python/dscoder/ops that define an op."""
    files = sorted((root / "python" / "dscoder" / "ops").glob("*.py"))
    return [file for file in files if file.stem == EXCHANGE or DEFINES in file.read_text(encoding="utf-8")]


def summary_of(file: Path) -> str:
    """What stands between the name and the source in the first line of an op's docstring."""
    first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return first.partition(": ")[2].partition(" (")[0].rstrip(".")


def last_run(op: str, runs: Sequence[Run]) -> str:
    """Day, card, commit and outcome of the newest check of `op`, with the best of what that run measured."""
    checks = [run for run in runs if op in run.tests]
    if not checks:
        return "never yet"
    run = checks[-1]
    tools = run.sanitizers.get(op, {})
    words = [f"{run.day}, {run.machine['device']}, {run.commit}: tests {counted(run.tests[op])}"]
    words += [f"{tool} {tools[tool]['outcome']}" for tool in TOOL_NAMES if tool in tools]
    measured = [
        result
        for result, _ in newest_results([run]).values()
        if result["op"] == op and result.get("has_kernel") and "share" in result
    ]
    best = max(measured, key=lambda result: float(result["share"]), default=None)
    if best is not None:
        peer = best_peer(best)
        beside = f", {peer[0]} takes {peer[1]:.2f}x" if peer else ""
        words.append(f"best {best['share']:.0f} % of the ceiling ({best['step']}{beside})")
    return "; ".join(words)


def replace_generated(text: str, made: str) -> str:
    """`text` with what stands between the markers replaced; ValueError without exactly one pair."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must hold one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"
