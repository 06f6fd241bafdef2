"""Pages, plots and the README's table, from stored runs."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.report import gpu_runs, main
from benchmarks.reporting.plots import ratios, roofline
from benchmarks.reporting.readme import (
    BEGIN,
    END,
    generated,
    last_run,
    op_files,
    ops_table,
    plots_of_newest,
    replace_generated,
    summary_of,
)
from benchmarks.reporting.records import RESULTS, read_run, read_runs
from benchmarks.reporting.summary import columns, summarize
from benchmarks.reporting.tables import device_report
from dscoder.runtime import native

ROOT = Path(__file__).resolve().parents[2]
NOON, ONE = "2026-11-20T12:00:00Z", "2026-11-20T13:00:00Z"
COPY = {"shape": "T=8192 D=2048 E=64 K=6", "model": "v2_lite", "GB/s": 3000.0, "share": 70.0}

Make = Callable[..., dict[str, Any]]
Store = Callable[..., Path]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its own heads first."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with a README and two ops; results are stored below it by `store`."""
    ops = tmp_path / "python" / "dscoder" / "ops"
    ops.mkdir(parents=True)
    defined = "\n\ndefine_op()\n"
    gate = f'"""moe_gate: pick K experts (paper, eq 20)."""{defined}'
    (ops / "moe_gate.py").write_text(gate, encoding="utf-8")
    (ops / "rope.py").write_text(f'"""rope: rotate pairs."""{defined}', encoding="utf-8")
    (ops / "library.py").write_text('"""No op."""\n', encoding="utf-8")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n", encoding="utf-8")
    return tmp_path


def test_the_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = generated(ROOT, native.kernel_ops(), gpu_runs(ROOT / RESULTS))
    assert replace_generated(text, made) == text, "run `python -m benchmarks.report`"


def test_the_table_says_what_never_ran(tree: Path) -> None:
    assert ops_table(tree, {"moe_gate"}, []).splitlines()[2:] == [
        "| [`moe_gate`](docs/moe_gate.md) | pick K experts | reference | sm_80, sm_90a | never yet |",
        "| [`rope`](docs/rope.md) | rotate pairs | reference | not yet |  |",
    ]


def test_the_table_says_when_on_what_and_with_what_result(make_result: Make, store: Store) -> None:
    runs = [read_run(store(NOON, make_result(share=90.0))), read_run(store(ONE, make_result()))]
    assert last_run("moe_gate", runs) == (
        "2026-11-20, NVIDIA H200, 012345678: tests 151 passed, 1 skipped; memcheck passed; synccheck passed; "
        "racecheck passed; best 20 % of the ceiling (forward, torch takes 2.00x)"
    )
    assert last_run("rope", runs) == "never yet"


def test_a_failure_is_said_too(make_result: Make, store: Store) -> None:
    run = read_run(store(NOON, tests={"moe_gate": {"passed": 2, "failed": 1}}, sanitizers={}, is_dirty=True))
    assert last_run("moe_gate", [run]) == (
        "2026-11-20, NVIDIA H200, 012345678 with changes: tests 1 failed, 2 passed"
    )


def test_the_plots_are_those_of_the_gpu_that_was_measured_last(make_result: Make, store: Store) -> None:
    older, newer = read_run(store(NOON, make_result())), read_run(store(ONE))
    root = older.path.parents[3]
    assert plots_of_newest(root, []) == ""
    assert plots_of_newest(root, [newer]) == ""  # it has no results
    other = replace(older, path=root / RESULTS / "nvidia_a100" / "x.json", machine={"device": "NVIDIA A100"})
    assert "results/nvidia_a100/ratios.png" in plots_of_newest(root, [older, other, newer])
    assert "nvidia_h200" not in plots_of_newest(root, [older, other, newer])
    assert "results/nvidia_h200/roofline.png" in plots_of_newest(root, [other, older])


def test_every_op_has_a_summary() -> None:
    files = op_files(ROOT)
    assert {"moe_gate", "rope", "mla_decode", "expert_parallel"} <= {file.stem for file in files}
    for file in files:
        assert len(summary_of(file)) > 10, file


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold one <!-- kernels:begin -->"):
        replace_generated(f"{BEGIN} {BEGIN} {END}", "table")


def test_a_page_has_checks_targets_and_results(make_result: Make, store: Store) -> None:
    slow = make_result("moe_permute", **COPY, step="backward", us=200.0)
    runs = [read_run(store(NOON, make_result(), slow))]
    page = device_report(runs, {("moe_gate",): 1.0})
    assert rows(page, "Checks")[1] == [
        *("`moe_gate`", "151 passed, 1 skipped", "passed", "passed", "passed", "2026-11-20", "012345678")
    ]
    targets = {row[0]: row[1:6] for row in rows(page, "Targets")[1:]}
    partly = "partly measured, 1 of 8"
    assert targets["moe_gate forward T=8192"] == ["us", "8", "3.5", "7", partly]
    assert targets["moe_permute backward T=8192"] == ["GB/s", "2800", "3900", "3000", partly]
    assert targets["moe_unpermute forward T=8192"] == ["GB/s", "2800", "3900", "", "not measured"]
    heads, values = rows(page, "moe_gate")
    row = dict(zip(heads, values, strict=True))
    assert (row["us"], row["GB/s"], row["% of ceiling"], row["torch / ours"]) == ("7", "860", "20", "2.00")
    assert row["vllm / ours"] == "failed"
    assert "- vllm: ImportError: no vllm" in page
    assert "slower than accepted" not in page


def marks(figure: Figure) -> list[int]:
    """Points of each panel, the lines of ceilings left out."""
    return [
        sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o") for axes in figure.axes
    ]


def test_every_result_has_one_mark_under_the_roof(make_result: Make) -> None:
    product = make_result("grouped_gemm", **{"TFLOP/s": 500.0, "us": 90.0})
    figure = roofline([make_result(), make_result(step="backward"), product], "NVIDIA H200")
    assert marks(figure) == [2, 1]
    assert figure.axes[1].lines[0].get_xdata()[0] == pytest.approx(500e3 / 860)


def test_the_quickest_peer_of_a_result_has_a_bar_at_its_label(make_result: Make) -> None:
    peers = {"torch": {"us": 1.0, "ratio": 3.0}, "triton": {"us": 1.0, "ratio": 0.5}}
    alone = {"vllm": {"error": "ImportError: no vllm"}}
    results = [make_result(), make_result(step="backward", peers=peers), make_result("rope", peers=alone)]
    (axes,) = ratios(results, "NVIDIA H200").axes
    bars = {round(bar.get_y() + bar.get_height() / 2, 6): bar for bar in axes.patches}
    assert {row: bar.get_x() + bar.get_width() for row, bar in bars.items()} == {0.0: 0.5, 1.0: 2.0}
    assert list(axes.get_yticks()) == [0, 1]
    assert [text.get_text().split()[1] for text in axes.get_yticklabels()] == ["backward", "forward"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"torch", "triton"}


def test_many_peers_make_no_tall_picture(make_result: Make) -> None:
    peers = {f"peer {i}": {"us": 1.0, "ratio": 1.0 + i} for i in range(10)}
    results = [make_result(shape=f"T={i}", peers=peers) for i in range(100)]
    assert ratios(results, "NVIDIA H200").get_figheight() < 12


def test_ratios_close_together_can_be_read(make_result: Make) -> None:
    figure = ratios([make_result()], "NVIDIA H200")
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    shown = [text for text in figure.axes[0].get_xticklabels() if low <= text.get_position()[0] <= high]
    assert {"1", "1.5", "2"} <= {text.get_text() for text in shown}


def test_lines_of_ceilings_are_named(make_result: Make) -> None:
    products = [
        make_result("grouped_gemm", dtype=dtype, **{"TFLOP/s": 10.0}) for dtype in ("bfloat16", "float32")
    ]
    copies, roof = roofline([make_result(), *products], "NVIDIA H200").axes
    assert [text.get_text() for text in copies.get_legend().get_texts()] == ["ceiling: a copy"]
    names = [text.get_text() for text in roof.get_legend().get_texts()]
    assert names == ["grouped_gemm", "ceilings bfloat16", "ceilings float32"]


def test_no_results_make_empty_plots() -> None:
    assert marks(roofline([], "cpu")) == []
    assert not ratios([], "cpu").axes[0].patches


def test_the_command_writes_all_and_accepts_and_flags(
    tree: Path, make_result: Make, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store(NOON, make_result()).parent
    assert main(["--accept", "--check"], root=tree) == 0
    written = {path.name for path in folder.iterdir()} - {"2026-11-20T12-00-00.json"}
    assert written == {"accepted.json", "report.md", "roofline.png", "ratios.png"}
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    readme = (tree / "README.md").read_text(encoding="utf-8")
    assert "151 passed" in readme
    shown = re.findall(r"!\[\w+ of NVIDIA H200\]\(([^)]+)\)", readme)
    assert shown == [
        "benchmarks/results/nvidia_h200/roofline.png",
        "benchmarks/results/nvidia_h200/ratios.png",
    ]
    for name in [*shown, *re.findall(r"\[its report\]\(([^)]+)\)", readme)]:
        assert (tree / name).is_file()
    store(ONE, make_result(us=7.5))
    assert main([], root=tree) == 0
    assert main(["--check"], root=tree) == 1
    assert "1.07 times the accepted time: moe_gate forward v2 uniform" in capsys.readouterr().out
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert rows(page, "Over 5 % slower than accepted")[1][1] == "1.07"


def test_a_folder_without_runs_is_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"], root=tree) == 2
    assert re.search(r"report: .*nowhere holds no runs", capsys.readouterr().err)


def test_runs_stored_elsewhere_leave_the_readme_alone(
    tree: Path, make_result: Make, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store(NOON, make_result()).parent
    elsewhere = folder.parent.rename(tree / "elsewhere")
    before = (tree / "README.md").read_text(encoding="utf-8")
    assert main(["--results", str(elsewhere)], root=tree) == 0
    assert (elsewhere / folder.name / "report.md").is_file()
    assert (tree / "README.md").read_text(encoding="utf-8") == before
    assert main(["--results", str(tree / "absent")], root=tree) == 2
    assert capsys.readouterr().err == f"report: --results must be a folder, got {tree / 'absent'}\n"


def spoiled(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**record, "benchmarks": [{**record["benchmarks"][0], **changes}]})


def test_bad_files_are_named_in_a_line_each_and_the_others_are_used(
    tree: Path, make_result: Make, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(NOON, make_result())
    record = json.loads(path.read_text(encoding="utf-8"))
    bad = {
        "a": "{",
        "b": json.dumps({"machine_info": [], "benchmarks": 3}),
        "c": spoiled(record, us="12 us"),
        "d": spoiled(record, **{"GB/s": 0.0}),
        "e": json.dumps({**record, "format": 2}),
        "f": spoiled(record, peers=["torch"]),
        "g": json.dumps({**record, "tests": [1]}),
        "h": spoiled(record, us=float("nan")),
        "accepted": '{"accepted": [{"op": "moe_gate"}]}',
    }
    for name, text in bad.items():
        (path.parent / f"{name}.json").write_text(text, encoding="utf-8")
    (path.parent / "z.json").mkdir()
    assert main([], root=tree) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    for name in [*bad, "z"]:
        assert [line for line in lines if f"{name}.json must " in line], name
    assert len(lines) == len(bad) + 1
    assert "1 results of 1 runs" in captured.out
    assert main(["--accept"], root=tree) == 2  # rather than overwrite what cannot be read
    assert (path.parent / "accepted.json").read_text(encoding="utf-8") == bad["accepted"]


def test_the_summary_names_what_is_slower_and_stays_short(make_result: Make, store: Store) -> None:
    path = store(NOON, make_result())
    assert main(["--accept"], root=_with_readme(path)) == 0
    failures = [{"test": f"tests/gpu/test_moe_gate.py::test_{i}", "reason": "x" * 300} for i in range(200)]
    steps = [{"name": f"step {i}", "outcome": "failed", "seconds": 1.0, "note": "y" * 900} for i in range(40)]
    benchmarks = [make_result(us=9.0)]
    run = store(ONE, failures=failures, steps=steps, benchmarks=benchmarks)
    text = summarize(json.loads(run.read_text(encoding="utf-8")), path.parent)
    assert "SLOWER than accepted" in text
    assert "1.29x" in text
    assert "200 FAILED" in text
    assert "and 188 more" in text
    assert "and 16 more" in text
    assert len(text) < 12_000


def _with_readme(path: Path) -> Path:
    root = path.parents[3]
    (root / "README.md").write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    return root


def test_columns_are_aligned() -> None:
    assert columns([("a", "b"), ("long", "c")]) == "a     b\nlong  c"


def test_runs_of_gpus_leave_cpus_out(make_result: Make, store: Store) -> None:
    path = store(NOON, make_result())
    folder = path.parents[1]
    (folder / "cpu").mkdir()
    (folder / "cpu" / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert [run.path for run in gpu_runs(folder)] == [path]
    assert len(read_runs(folder / "cpu")) == 1
