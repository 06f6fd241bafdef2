"""benchmarks.gpu_check from end to end, on a stand-in for a machine with a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.check.sanitizer import TOOLS
from benchmarks.check.steps import make_plan, sanitizer_runs
from benchmarks.reporting.targets import read_targets
from dscoder.runtime import native
from tests.benchmarks.stand_in import CLEAN, GOOD_TEST, ROOT, Machine, outcomes

FINDS = (
    """[ "$tool" = synccheck ] && { echo "========= Barrier error detected. Divergent thread(s) in warp"
echo "========= ERROR SUMMARY: 1 error"; exit 86; }
"""
    + CLEAN
)
FAILING_TEST = """
import pytest
@pytest.mark.gpu
@pytest.mark.sanitize
def test_b(): assert 1 == 2
"""


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
    assert record["missing"] == []
    assert "NOT SHOWN" not in done.stdout
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


def test_each_tool_goes_through_all_ops_before_the_next() -> None:
    runs = sanitizer_runs(["alpha", "beta"])
    assert [tool for _, tool in runs] == [tool for tool in TOOLS for _ in range(2)]
    assert runs[:3] == [("alpha", "memcheck"), ("beta", "memcheck"), ("alpha", "synccheck")]


def test_a_tool_that_no_test_is_meant_for_is_not_missed(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine()
    mark = '@pytest.mark.sanitize("memcheck", "synccheck")'
    machine.write("tests/gpu/test_beta.py", f"import pytest\n@pytest.mark.gpu\n{mark}\ndef test_b(): pass\n")
    assert machine.run("beta").returncode == 0
    record = machine.record()
    assert record["sanitizers"]["beta"]["racecheck"]["outcome"] == "does not apply"
    assert record["is_complete"]


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
    done = machine.run()
    assert done.returncode == 3
    record = machine.record()
    assert {one["outcome"] for one in record["sanitizers"]["alpha"].values()} == {"not available"}
    assert not record["is_complete"]
    assert record["missing"] == ["sanitizers: not available"]
    assert "NOT SHOWN: sanitizers: not available" in done.stdout
    # What did run counts.
    assert record["tests"]["alpha"]["passed"] == 3
    assert record["benchmarks"][0]["us"] == 7.0


def test_a_build_without_kernels_for_the_gpu_ends_it(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(arch=None)
    done = machine.run()
    assert done.returncode == 1
    record = machine.record()
    assert outcomes(record) == {"build": "failed"}
    assert not record["is_complete"]
    assert "the GPU is of compute capability 9.0" in record["steps"][0]["note"]


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


def test_what_has_kernels_is_tested_and_measured_on_a_gpu() -> None:
    plan = make_plan(ROOT, [])
    # Their kernels are tested and measured with those of moe_gate and moe_permute.
    parts = {"moe_gate_with_balance", "moe_permute_maps"}
    assert native.kernel_ops() - parts <= set(plan.tests)
    assert native.kernel_ops() - parts <= set(plan.benchmarks)
    for arch in ("mla_prefill_sm90", "mla_prefill_backward_sm90", "grouped_gemm_sm90", "mla_decode_sm90"):
        assert arch in plan.tests


def test_what_has_targets_is_measured_on_a_gpu() -> None:
    homes = {"training_step": "model"}  # of targets that are about no op
    measured = set(make_plan(ROOT, []).benchmarks)
    assert {homes.get(target.op, target.op) for target in read_targets()} <= measured
