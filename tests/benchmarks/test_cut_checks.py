"""Benchmarks of a check, what is cut of them, and how a check says that it did not show all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.check.events import read_events
from benchmarks.check.process import Budget, Runner
from benchmarks.check.record import Record
from benchmarks.check.steps import MIN_BENCHMARK_S, Check, make_plan, run_benchmarks, worst
from benchmarks.gpu_check import exit_status, missing_from
from benchmarks.shapes import LAYERS, TOKENS, routed_cases
from tests.benchmarks.stand_in import BENCH, GOOD_TEST, Machine, outcomes

ROOT = Path(__file__).resolve().parents[2]
# A benchmark as the real ones are written, on sizes that take no time.
ADD = """
import torch
from dscoder.testing.measure import Problem
from dscoder.testing.results import Case

def test_step(measure):
    case = Case(op="add", step="forward", shape="T=2", dtype=torch.float32, num_bytes=24.0)
    measure(case, Problem(args=(torch.ones(2), torch.zeros(2))), torch.add, {"sub": torch.sub})
"""


def test_ops_with_targets_come_first_in_their_order(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    for op in ("grouped_gemm", "moe_unpermute", "moe_permute", "moe_gate"):
        machine.write(f"tests/gpu/test_{op}.py", GOOD_TEST)
        machine.write(f"benchmarks/bench_{op}.py", BENCH)
    wanted = ["moe_gate", "moe_permute", "moe_unpermute", "grouped_gemm", "alpha"]
    plan = make_plan(machine.root, [])
    assert list(plan.tests) == list(plan.benchmarks) == wanted


def test_what_goes_beyond_an_ops_own_file_runs_last_and_alone(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    head = "import time, pytest\nfrom pathlib import Path\n"
    head += "pytestmark = [pytest.mark.gpu, pytest.mark.sanitize]\n"
    head += "seen = Path('seen')\n"
    machine.write("tests/gpu/test_moe_gate.py", head + "def test_it(): time.sleep(1); seen.touch()\n")
    machine.write("tests/gpu/test_moe_gate_more.py", head + "def test_it(): assert seen.exists()\n")
    plan = make_plan(machine.root, [])
    assert list(plan.tests) == ["moe_gate", "alpha", "moe_gate_more"]
    done = machine.run("moe_gate")
    assert done.returncode == 0, done.stdout


def test_what_is_about_another_gpu_does_not_apply(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    skip = "import pytest\nskip = pytest.mark.skip('needs another')\n"
    skip += "pytestmark = [pytest.mark.gpu, pytest.mark.sanitize, skip]\n"
    machine.write("tests/gpu/test_beta.py", GOOD_TEST)
    machine.write("tests/gpu/test_beta_more.py", skip + "def test_it(): assert False\n")
    machine.write("benchmarks/bench_beta.py", BENCH)
    machine.write("benchmarks/bench_beta_more.py", skip + "def test_it(benchmark): assert False\n")
    done = machine.run("beta")
    assert done.returncode == 0, done.stdout
    found = outcomes(machine.record())
    assert found["tests beta"] == found["benchmarks beta"] == "passed"
    names = ["tests beta_more", "memcheck beta_more", "benchmarks beta_more"]
    assert {found[name] for name in names} == {"does not apply"}


def test_an_op_without_benchmarks_can_pass(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.write("tests/gpu/test_beta.py", GOOD_TEST)
    done = machine.run("beta")
    assert done.returncode == 0, done.stdout
    assert machine.record()["is_complete"]


def test_ours_is_measured_on_all_cases_before_any_peer(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    look = "def test_look(benchmark, request):\n    benchmark.pedantic(lambda: None)\n"
    look += "    benchmark.extra_info['is_alone'] = request.config.getoption('--check-ours')\n"
    machine.write("benchmarks/bench_alpha.py", BENCH + look)
    machine.write("tests/gpu/test_moe_gate.py", GOOD_TEST)
    machine.write("benchmarks/bench_moe_gate.py", BENCH)
    machine.run()
    record = machine.record()
    steps = [name for name in outcomes(record) if name.startswith("benchmarks")]
    assert steps == ["benchmarks ours", "benchmarks moe_gate", "benchmarks alpha"]
    names = [result["test"].rpartition("/")[2] for result in record["benchmarks"]]
    assert names == [
        "bench_moe_gate.py::test_forward",
        "bench_alpha.py::test_forward",
        "bench_alpha.py::test_look",
    ]
    assert record["benchmarks"][-1]["is_alone"] is False  # the later result, the one beside peers, is kept
    log = machine.root / "build" / "gpu-check" / "logs" / "bench-ours.jsonl"
    assert '"is_alone": true' in log.read_text(encoding="utf-8")


def test_the_usual_batch_of_both_models_comes_first() -> None:
    steps = ("forward", "backward")
    found = routed_cases(*steps, many=True)
    first = [(model, TOKENS, "uniform", step) for model in LAYERS for step in steps]
    assert found[: len(first)] == first
    at_usual_batch = [num_tokens == TOKENS for _, num_tokens, _, _ in found]
    assert at_usual_batch == sorted(at_usual_batch, reverse=True)


@pytest.mark.slow
def test_peers_are_left_out_of_the_first_run(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("conftest.py", "bench.ini"):
        shutil.copy(ROOT / "benchmarks" / name, folder)
    (folder / "bench_add.py").write_text(ADD, encoding="utf-8")
    kept = {}
    for option in ("--check-ours", "--benchmark-only"):
        events = tmp_path / f"{option}.jsonl"
        command = [sys.executable, "-m", "pytest", "-c", "bench.ini", "-p", "benchmarks.check.plugin", option]
        command += [
            f"--check-events={events}",
            "--benchmark-enable",
            "-p",
            "no:cacheprovider",
            "bench_add.py",
        ]
        # A worker of xdist is no place to measure in; what it starts must not take itself for one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {**inherited, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        (kept[option],) = read_events(events, is_stopped=False).measured
    assert kept["--check-ours"]["us"] > 0
    assert kept["--check-ours"]["peers"] == {}
    assert list(kept["--benchmark-only"]["peers"]) == ["sub"]


def test_benchmarks_are_cut_when_little_is_left(make_machine: Callable[..., Machine], tmp_path: Path) -> None:
    root = make_machine().root
    plan = make_plan(root, [])
    begin = datetime(2026, 11, 20, tzinfo=UTC)
    record = Record([tmp_path / "record.json"], {}, ops=["alpha"], begin=begin, announce=str)
    runner = Runner(root, tmp_path / "logs", {})
    check = Check(runner=runner, budget=Budget(MIN_BENCHMARK_S), record=record, plan=plan)
    assert run_benchmarks(check) == "cut"
    for step in record.data["steps"]:
        assert step["outcome"] == "cut"
        assert "s of the budget were left" in step["note"]
    assert missing_from(record.data["steps"], is_over=True) == [
        "benchmarks ours: cut",
        "benchmarks alpha: cut",
    ]
    assert not list(runner.logs.iterdir())


def test_a_cut_run_says_how_much_of_it_there_is(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    slow = "import time\ndef test_s(benchmark): time.sleep(300)\n"
    machine.write("benchmarks/bench_alpha.py", BENCH + slow)
    done = machine.run("--budget", "32")
    assert done.returncode == 3, done.stdout
    record = machine.record()
    assert not record["is_complete"]
    notes = {step["name"]: step.get("note") for step in record["steps"]}
    assert notes["benchmarks ours"] == "1 of 2 results until its limit"
    assert "benchmarks ours: cut" in record["missing"]
    assert [result["us"] for result in record["benchmarks"]] == [7.0]


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (["passed", "passed", "does not apply", "passed"], 0),
        (["passed", "passed", "not available", "passed"], 3),
        (["passed", "passed", "passed", "cut"], 3),
        (["passed", "stopped", "passed", "passed"], 3),
        (["passed", "passed", "nothing ran", "passed"], 3),
        (["passed", "stopped", "found", "cut"], 1),
        (["failed"], 1),
    ],
)
def test_the_exit_status_tells_failed_from_unfinished(outcomes: list[str], status: int) -> None:
    steps = [{"name": str(i), "outcome": outcome} for i, outcome in enumerate(outcomes)]
    assert exit_status(outcomes, missing_from(steps, is_over=True)) == status


def test_a_failure_does_not_hide_what_was_cut() -> None:
    steps = [{"name": "a", "outcome": "failed"}, {"name": "b", "outcome": "cut"}]
    assert worst(["failed", "cut"]) == "failed"
    assert missing_from(steps, is_over=True) == ["b: cut"]
    assert missing_from([], is_over=False) == ["the check did not come to its end"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_check_leaves_what_it_had_done(
    make_machine: Callable[..., Machine], number: signal.Signals
) -> None:
    machine = make_machine()
    slow = "import time\ndef test_s(benchmark): time.sleep(30)\n"
    machine.write("benchmarks/bench_alpha.py", BENCH + slow)
    process = subprocess.Popen(
        machine.command(), env=dict(machine.environment), cwd=machine.root, stdout=subprocess.PIPE, text=True
    )
    events = machine.root / "build" / "gpu-check" / "logs" / "bench-ours.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and "test_s" in events.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    record = machine.record()
    assert not record["is_complete"]
    assert record["tests"] == {"alpha": {"passed": 3, "skipped": 1}}
    assert record["sanitizers"]["alpha"]["racecheck"]["outcome"] == "passed"
    if number == signal.SIGTERM:
        assert [result["us"] for result in record["benchmarks"]] == [7.0]
        assert "INCOMPLETE" in said
