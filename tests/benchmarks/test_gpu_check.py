"""benchmarks.gpu_check from end to end, on a stand-in for a machine with a GPU.

A module named torch that reports one, small tests and benchmarks, and a program named compute-sanitizer that
runs what it is given; dscoder counts as installed. What is real is everything the check itself does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.check.process import Budget, Runner
from benchmarks.check.record import Record
from benchmarks.check.steps import MIN_BENCHMARK_S, Check, make_plan, run_benchmarks
from benchmarks.gpu_check import exit_status

ROOT = Path(__file__).resolve().parents[2]
TORCH = """
__version__ = "2.11.0+cu130"
class version:
    cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: {has_gpu})
    get_device_name = staticmethod(lambda: "NVIDIA H200")
    get_device_capability = staticmethod(lambda: (9, 0))
"""
# An editable install of dscoder would come before any stand-in.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if not type(one).__name__.startswith("ScikitBuild")]
"""
# The parts of dscoder that the check asks for: an import with kernels for this GPU.
NATIVE = """
from types import SimpleNamespace
_C = SimpleNamespace(__file__=__file__)
require_kernels = lambda op: None
arch_for = lambda capability: {arch!r}
cuda_archs = lambda: ("90a",)
build_tools = lambda: {{"nvcc": "13.0.88"}}
"""
SANITIZER = """#!/bin/sh
while [ "${{1#--}}" != "$1" ]; do case "$1" in
    --tool=*) tool="${{1#--tool=}}";;
    --kernel-name) shift;;
esac; shift; done
"$@"; code=$?
{says}
exit $code
"""
CLEAN = """if [ "$tool" = racecheck ]; then
echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
else echo "========= ERROR SUMMARY: 0 errors"; fi"""
FINDS = (
    """[ "$tool" = synccheck ] && { echo "========= Barrier error detected. Divergent thread(s) in warp"
echo "========= ERROR SUMMARY: 1 error"; exit 86; }
"""
    + CLEAN
)
GOOD_TEST = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.sanitize
def test_small(): pass
@pytest.mark.sanitize("memcheck", "synccheck")
def test_wgmma(): pass
def test_large(): pass
def test_two_gpus(): pytest.skip("needs two GPUs")
"""
FAILING_TEST = """
import pytest
@pytest.mark.gpu
@pytest.mark.sanitize
def test_b(): assert 1 == 2
"""
BENCH = """
def test_forward(benchmark):
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        op="alpha", step="forward", model="v2", routing="uniform", shape="T=8192 E=160", dtype="float32",
        device="NVIDIA H200", method="graph", us=7.0, share=40.0, has_kernel=True,
        peers={"torch": {"us": 70.0, "ratio": 10.0}},
    )
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The stand-in: where the check runs, and what it finds."""

    root: Path
    environment: Mapping[str, str]

    def write(self, name: str, text: str) -> None:
        """A file below the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def command(self, *arguments: str) -> list[str]:
        """What runs the check there."""
        program = (
            "import sys; from pathlib import Path; from benchmarks.gpu_check import main; "
            "raise SystemExit(main(sys.argv[2:], root=Path(sys.argv[1])))"
        )
        return [sys.executable, "-c", program, str(self.root), "--installed", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=dict(self.environment),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def record(self) -> dict[str, Any]:
        """The one record there is."""
        (path,) = self.root.glob("benchmarks/results/nvidia_h200/*.json")
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored


@pytest.fixture
def make_machine(tmp_path: Path) -> Callable[..., Machine]:
    def make(*, has_gpu: bool = True, arch: str | None = "90a", says: str | None = CLEAN) -> Machine:
        root, fakes, programs = tmp_path / "tree", tmp_path / "fakes", tmp_path / "programs"
        programs.mkdir()
        if says is not None:
            sanitizer = programs / "compute-sanitizer"
            sanitizer.write_text(SANITIZER.format(says=says), encoding="utf-8")
            sanitizer.chmod(0o755)
        kept = ("HOME", "LANG", "TMPDIR")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {
            "PATH": os.pathsep.join((str(programs), "/usr/bin", "/bin")),
            "PYTHONPATH": os.pathsep.join((str(fakes), str(ROOT))),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the others take a second to import
            "PYTEST_PLUGINS": "pytest_benchmark.plugin",
        }
        machine = Machine(root=root, environment=environment)
        machine.write("../fakes/torch.py", TORCH.format(has_gpu=has_gpu))
        machine.write("../fakes/sitecustomize.py", NO_EDITABLE)
        machine.write("../fakes/dscoder/__init__.py", "")
        machine.write("../fakes/dscoder/runtime/__init__.py", "")
        machine.write("../fakes/dscoder/runtime/native.py", NATIVE.format(arch=arch))
        machine.write(
            "pytest.ini", "[pytest]\npython_files = test_*.py bench_*.py\nmarkers =\n gpu\n sanitize\n"
        )
        machine.write("tests/gpu/test_alpha.py", GOOD_TEST)
        machine.write("benchmarks/bench_alpha.py", BENCH)
        return machine

    return make


def outcomes(record: Mapping[str, Any]) -> dict[str, str]:
    return {step["name"]: step["outcome"] for step in record["steps"]}


def test_a_machine_without_a_gpu_is_refused(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(has_gpu=False)
    done = machine.run()
    assert done.returncode == 2
    assert done.stderr == (
        "gpu-check: torch 2.11.0+cu130 finds no NVIDIA GPU on this machine; nothing was built or checked\n"
    )
    assert not (machine.root / "benchmarks" / "results").exists()


def test_an_op_without_gpu_tests_is_refused(make_machine: Callable[..., Machine]) -> None:
    done = make_machine().run("alpha", "omega")
    assert done.returncode == 2
    assert done.stderr == "gpu-check: OPS must name ops with GPU tests (alpha), got omega\n"


def test_all_is_run_recorded_and_shown(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    done = machine.run("--out", "out", "--commit", "0123456789abcdef")
    assert done.returncode == 0, done.stdout + done.stderr
    record = machine.record()
    assert record["kind"] == "gpu-check"
    assert record["is_complete"]
    assert (record["device"], record["torch"]) == ("NVIDIA H200", "2.11.0+cu130")
    assert record["commit"] == "0123456789abcdef"
    assert record["tests"] == {"alpha": {"passed": 3, "skipped": 1}}
    assert {tool: found["outcome"] for tool, found in record["sanitizers"]["alpha"].items()} == {
        "memcheck": "passed",
        "synccheck": "passed",
        "racecheck": "passed",
    }
    (result,) = record["benchmarks"]
    assert result["test"].endswith("bench_alpha.py::test_forward")
    assert (result["op"], result["us"], result["peers"]["torch"]["ratio"]) == ("alpha", 7.0, 10.0)
    assert set(outcomes(record).values()) == {"passed"}
    for shown in ("3 passed, 1 skipped", "40 %: forward T=8192 E=160, 7.0 us, torch / ours 10.00"):
        assert shown in done.stdout
    assert len(done.stdout) < 12_000
    assert json.loads((machine.root / "out" / "gpu-check.json").read_text(encoding="utf-8")) == record
    assert "==== test-alpha.log ====" in (machine.root / "out" / "gpu-check.log").read_text(encoding="utf-8")


def test_each_tool_has_the_tests_marked_for_it(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.run()
    logs = machine.root / "build" / "gpu-check" / "logs"
    names = {}
    for tool in ("memcheck", "racecheck"):
        lines = (logs / f"{tool}-alpha.jsonl").read_text(encoding="utf-8").splitlines()
        names[tool] = {json.loads(line)["test"].partition("::")[2] for line in lines if '"test"' in line}
    assert names == {"memcheck": {"test_small", "test_wgmma"}, "racecheck": {"test_small"}}


def test_a_failure_fails_the_check_and_is_named(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.write("tests/gpu/test_beta.py", FAILING_TEST)
    done = machine.run()
    assert done.returncode == 1
    record = machine.record()
    assert record["is_complete"]
    assert record["tests"]["beta"] == {"failed": 1}
    assert record["tests"]["alpha"]["passed"] == 3
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_beta.py::test_b")
    assert failure["reason"] == "assert 1 == 2"
    assert "1 FAILED" in done.stdout


def test_a_crash_takes_down_its_own_file_alone(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    text = "import os, pytest\n@pytest.mark.gpu\ndef test_b(): os.abort()\n"
    machine.write("tests/gpu/test_beta.py", text)
    assert machine.run().returncode == 1
    record = machine.record()
    assert record["tests"] == {"alpha": {"passed": 3, "skipped": 1}, "beta": {"crashed": 1}}


def test_a_file_that_cannot_be_imported_fails(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    machine.write("tests/gpu/test_beta.py", "import no_such_module\n")
    assert machine.run("beta").returncode == 1
    record = machine.record()
    assert record["tests"] == {"beta": {"error": 1}}
    assert "no_such_module" in record["failures"][0]["reason"]


def test_tests_that_were_all_skipped_are_no_pass(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    text = "import pytest\n@pytest.mark.gpu\ndef test_b(): pytest.skip('no kernels')\n"
    machine.write("tests/gpu/test_beta.py", text)
    assert machine.run("beta").returncode == 1
    (step,) = [step for step in machine.record()["steps"] if step["name"] == "tests beta"]
    assert (step["outcome"], step["note"]) == ("failed", "nothing ran: Skipped: no kernels")


def test_what_a_sanitizer_finds_fails_the_check(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(says=FINDS)
    done = machine.run()
    assert done.returncode == 1
    found = machine.record()["sanitizers"]["alpha"]
    assert found["synccheck"]["outcome"] == "found"
    assert found["memcheck"]["outcome"] == "passed"
    assert "Barrier error detected" in done.stdout


@pytest.mark.skipif(Path("/usr/local/cuda/bin/compute-sanitizer").exists(), reason="a toolkit has it")
def test_a_sanitizer_that_is_not_there_never_passed(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(says=None)
    assert machine.run().returncode == 0
    found = machine.record()["sanitizers"]["alpha"]
    assert {one["outcome"] for one in found.values()} == {"not available"}


def test_a_build_without_kernels_for_the_gpu_ends_it(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(arch=None)
    done = machine.run()
    assert done.returncode == 1
    record = machine.record()
    assert outcomes(record) == {"build": "failed"}
    assert not record["is_complete"]
    assert "the GPU is of compute capability 9.0" in record["steps"][0]["note"]


def test_benchmarks_are_cut_when_little_is_left(make_machine: Callable[..., Machine], tmp_path: Path) -> None:
    root = make_machine().root
    plan = make_plan(root, [])
    begin = datetime(2026, 11, 20, tzinfo=UTC)
    record = Record([tmp_path / "record.json"], {}, ops=["alpha"], begin=begin, announce=str)
    runner = Runner(root, tmp_path / "logs", {})
    check = Check(runner=runner, budget=Budget(MIN_BENCHMARK_S), record=record, plan=plan)
    assert run_benchmarks(check) == "cut"
    (step,) = record.data["steps"]
    assert (step["name"], step["outcome"]) == ("benchmarks alpha", "cut")
    assert "s of the budget were left" in step["note"]
    assert not list(runner.logs.iterdir())


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (["passed", "passed", "not available", "cut"], 0),
        (["passed", "stopped", "passed", "passed"], 3),
        (["passed", "passed", "nothing ran", "passed"], 3),
        (["passed", "stopped", "found", "cut"], 1),
        (["failed"], 1),
    ],
)
def test_the_exit_status_tells_failed_from_unfinished(outcomes: list[str], status: int) -> None:
    assert exit_status(outcomes) == status


def test_tests_that_do_not_end_are_stopped_and_the_rest_goes_on(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    slow = "import time, pytest\n@pytest.mark.gpu\ndef test_b(): time.sleep(60)\n"
    machine.write("tests/gpu/test_beta.py", GOOD_TEST + slow)
    done = machine.run("beta", "--budget", "15")
    assert done.returncode == 3, done.stdout
    record = machine.record()
    assert record["tests"]["beta"] == {"passed": 3, "skipped": 1}
    assert outcomes(record)["tests beta"] == "stopped"
    assert set(record["sanitizers"]["beta"]) == {"memcheck", "synccheck", "racecheck"}
    assert not record["is_complete"]
    assert "INCOMPLETE" in done.stdout
    assert record["seconds"] < 30


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
    events = machine.root / "build" / "gpu-check" / "logs" / "bench-alpha.jsonl"
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
