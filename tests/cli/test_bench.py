"""`dscoder bench`: which files it runs, what it says when it cannot, what it stores."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import dscoder
from dscoder.cli import bench
from dscoder.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RECORD = {
    "op": "moe_gate",
    "step": "forward",
    "model": "v2",
    "routing": "one_hot",
    "shape": "T=128 E=160 K=6",
    "us": 12.5,
    "share": 7.0,
    "peers": {"torch": {"us": 25.0, "ratio": 2.0}, "vllm": {"error": "RuntimeError: no"}},
}
# One benchmark as the real ones are written, on sizes that take no time.
BENCHMARK = """
import pytest
import torch
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

@pytest.mark.parametrize("model", ["small", "large"])
def test_step(measure, model):
    case = Case(op="add", step="forward", model=model, shape="T=2", dtype=torch.float32, num_bytes=24.0)
    measure(case, Problem(args=(torch.randn(2), torch.randn(2))), torch.add, {"sub": torch.sub})
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout with one benchmark in it."""
    folder = tmp_path / "home" / "benchmarks"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "shapes.py", "start.py", "bench.ini"):
        (folder / name).write_text((ROOT / "benchmarks" / name).read_text())
    (folder / "peers").symlink_to(ROOT / "benchmarks" / "peers")
    (folder / "bench_add.py").write_text(BENCHMARK)
    (folder / "bench_broken.py").write_text("def test_it(benchmark):\n    benchmark(lambda: 1 / 0)\n")
    return folder.parent


def test_every_op_of_the_checkout_can_be_chosen() -> None:
    files = bench.benchmarks_of(bench.find_home(bench.HOMES))
    assert {"moe_gate", "moe_permute", "grouped_gemm", "fim"} <= set(files)
    assert bench.chosen(files, ["rope", "moe_gate"]) == [files["rope"], files["moe_gate"]]
    assert len(bench.chosen(files, [])) == len(files)


def test_the_wheel_brings_what_the_verb_looks_for() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"][
        "packages"
    ]
    assert packages[f"dscoder/{bench.HOMES[0].name}/benchmarks"] == "benchmarks"
    assert bench.HOMES[0].parent == Path(dscoder.__file__).parent


def test_the_package_comes_before_a_checkout(home: Path, tmp_path: Path) -> None:
    assert bench.find_home((tmp_path / "absent", home, ROOT)) == home
    with pytest.raises(RuntimeError, match=r"^the benchmarks must be in one of .*absent, found in none$"):
        bench.find_home((tmp_path / "absent",))


def test_a_run_is_kept_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = bench._default_out(ROOT)
    assert out.suffix == ".json"
    assert out.parent.parent == tmp_path / "runs" / "bench"
    assert not out.parent.exists()


def test_an_unknown_op_is_named_beside_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "moe_gate", "warp_drive"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dscoder bench: op must be one of ")
    assert ", moe_gate, " in message
    assert message.endswith(", got warp_drive\n")


def test_what_is_missing_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["bench", "rope"]) == 1
    assert capsys.readouterr().err == (
        "dscoder bench: pytest and pytest-benchmark must be installed to run benchmarks: "
        "pip install 'dscoder[bench]'\n"
    )


@pytest.mark.slow
def test_a_run_is_shown_and_stored(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "HOMES", (home,))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")  # of the caller, not ours
    out = tmp_path / "kept" / "run.json"
    assert main(["bench", "add", "--only", "small", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    [kept] = [item["extra_info"] for item in report["benchmarks"]]
    assert (kept["op"], kept["model"], kept["method"]) == ("add", "small", "wall")
    assert kept["peers"]["sub"]["error"].startswith("AssertionError: ")
    assert {"device", "torch", "cuda", "driver", "python", "commit", "is_dirty"} <= set(
        report["machine_info"]
    )
    shown = capfd.readouterr().out
    assert "add.py::test_step[small]: us " in shown
    assert f"stored in {out}" in shown


# Ends up in the child that times: `started` exists once one benchmark is done and the other one runs.
SLEEPER = """
import time
from pathlib import Path

def test_quick(store, benchmark):
    benchmark.pedantic(lambda: None)
    store("add", "forward", "T=2", {}, {})

def test_slow(benchmark):
    Path("started").touch()
    time.sleep(600)
"""
VERB = "import sys; from pathlib import Path; from dscoder.cli import bench, main; "


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_keeps_what_it_measured(
    home: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (home / "benchmarks" / "bench_sleep.py").write_text(SLEEPER)
    # What lies where the user is shadows nothing.
    (tmp_path / "json.py").write_text("raise SystemExit('the json of somebody')")
    code = VERB + f"bench.HOMES = (Path({str(home)!r}),); sys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "bench", "sleep", "--out", "run.json"]
    environment = {**os.environ, "PYTEST_ADDOPTS": "--no-such-option"}
    with (tmp_path / "said").open("w") as said:
        verb = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and verb.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):  # as timeout(1) does
        verb.send_signal(number)
    assert verb.wait(timeout=60) == status, (tmp_path / "said").read_text()
    report = json.loads((tmp_path / "run.json").read_text())
    assert [one["extra_info"]["op"] for one in report["benchmarks"] if "op" in one["extra_info"]] == ["add"]
    text = (tmp_path / "said").read_text()
    assert "stored in run.json" in text
    assert f"ended by {number.name}" in text
    assert {path.name for path in tmp_path.iterdir()} == {"home", "json.py", "run.json", "said", "started"}


def test_a_second_signal_kills(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    code = VERB + f"print(bench.run_stoppable([sys.executable, '-c', {deaf!r}]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as verb:
        assert verb.stdout is not None
        assert verb.stdout.readline() == "1\n"
        verb.send_signal(signal.SIGTERM)
        time.sleep(bench.SAME_STOP_SECONDS + 0.2)
        verb.send_signal(signal.SIGINT)
        assert verb.stdout.read() == f"{(-signal.SIGKILL.value, signal.SIGTERM.value)}\n"


def test_out_is_checked_before_anything_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rope", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"dscoder bench: out must be a file, got the folder {tmp_path}\n"
    (tmp_path / "x.json").touch()
    assert main(["bench", "rope", "--out", str(tmp_path / "x.json" / "y.json")]) == 1
    assert f"a folder that can be written, got {tmp_path / 'x.json'}: " in capsys.readouterr().err


def test_a_run_that_stored_nothing_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, out = tmp_path / "fresh.json", tmp_path / "old.json"
    out.write_text("not whole {")
    fresh.touch()
    bench.keep(fresh, out)
    assert capsys.readouterr().out == "nothing is stored: the run ended before it wrote a result\n"
    assert out.read_text() == "not whole {"
    fresh.write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    bench.keep(fresh, out)
    assert f"stored in {out} (replaced the run that was there)" in capsys.readouterr().out
    assert json.loads(out.read_text())["benchmarks"] == []


@pytest.mark.slow
def test_what_fails_or_matches_nothing_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "HOMES", (home,))
    out = ["--out", str(tmp_path / "run.json")]
    assert main(["bench", "broken", *out]) == 1
    captured = capfd.readouterr()
    assert "ZeroDivisionError" in captured.out
    assert "dscoder bench: a benchmark failed" in captured.err
    assert main(["bench", "add", "--only", "medium", *out]) == 1
    assert "only must match a benchmark, got 'medium'" in capfd.readouterr().err


def shown_table(machine: dict[str, Any], *records: dict[str, Any]) -> list[str]:
    report = {"machine_info": machine, "benchmarks": [{"extra_info": kept} for kept in records]}
    console = Console(width=200, file=StringIO())
    console.print(bench.results_table(report))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_table_has_a_row_a_record_and_names_failed_peers() -> None:
    kept = {**RECORD, "dtype": "float32", "has_kernel": True}
    title, _, row, *rest = shown_table({"device": "NVIDIA H200", "torch": "2.13.0", "note": None}, kept, {})
    assert title == "NVIDIA H200, torch 2.13.0"
    assert row == "moe_gate forward v2 one_hot float32 T=128 E=160 K=6 kernel 12.5 7 torch 2.00x, vllm failed"
    assert rest == []


def test_the_table_says_that_there_was_no_gpu_and_what_the_ceilings_are() -> None:
    ceilings = {"dtype": "float32", "ceiling_GB/s": 20.5, "ceiling_TFLOP/s": 0.15, "has_kernel": False}
    kept = {**RECORD, **ceilings, "bound": "cache"}
    kept.pop("share")
    machine = {"device": "AMD EPYC, 2 threads", "torch": "2.13.0", "note": "torch found no GPU"}
    first, second, third, _, row = shown_table(machine, kept, {**ceilings, "dtype": "int32"})
    assert first == "AMD EPYC, 2 threads, torch 2.13.0; torch found no GPU"
    assert second == "ceilings: copy 20.5 GB/s, float32 product 0.15 TFLOP/s"
    assert third == "no kernel ran: the times of ops are those of their references in plain PyTorch"
    assert "reference 12.5 in cache torch" in row
