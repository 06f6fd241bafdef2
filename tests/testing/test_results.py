import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dscoder.runtime import native
from dscoder.testing import results
from dscoder.testing.results import Case, Timing
from dscoder.testing.timing import Ceilings


def test_the_report_names_the_device_and_not_the_host(tmp_path: Path) -> None:
    machine = {"node": "somebodys-laptop", "machine": "x86_64", "cpu": {"flags": ["avx"], "count": 2}}
    results.describe_machine(machine, torch.device("cpu"), tmp_path)
    assert "node" not in machine
    assert machine["machine"] == "x86_64"
    assert machine["cpu"] == {"count": 2}
    assert f"{torch.get_num_threads()} threads" in machine["device"]
    assert machine["torch"] == torch.__version__
    assert (machine["driver"], machine["commit"], machine["is_dirty"]) == (None, None, None)


def test_a_checkout_is_named_by_its_commit_and_its_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    results.machine.cache_clear()
    found = results.machine(torch.device("cpu"), tmp_path)
    assert (found["commit"], found["is_dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    results.machine.cache_clear()
    assert results.machine(torch.device("cpu"), tmp_path)["is_dirty"] is True


def test_single_times_are_dropped() -> None:
    report = {"benchmarks": [{"name": "a", "stats": {"median": 1.0, "data": [1.0, 1.0]}}]}
    results.drop_rounds(report)
    assert report == {"benchmarks": [{"name": "a", "stats": {"median": 1.0}}]}


def kept(*, method: str = "wall", is_warm: bool = False, **amounts: float) -> dict[str, Any]:
    """A record of a call of one second; the ceilings are 2 TFLOP/s and 4 GB/s."""
    return results.record(
        Case(op="add", step="forward", shape="T=2", dtype=torch.float32, **amounts),
        device=torch.device("cpu"),
        ours=Timing(seconds=1.0, method=method),
        peers={},
        ceilings=Ceilings(flops_per_second=2e12, bytes_per_second=4e9),
        is_warm=is_warm,
    )


@pytest.mark.parametrize(
    ("given", "share", "bound"),
    [
        ({"num_bytes": 1e9}, 25.0, "memory"),
        ({"num_bytes": 1e9, "is_warm": True}, None, "cache"),
        ({"num_bytes": 5e9}, None, "cache"),
        ({"num_bytes": 5e9, "method": "graph"}, 125.0, "memory"),
        ({"num_bytes": 1e9, "flops": 1e12, "is_warm": True}, 50.0, "compute"),
        ({"flops": 3e12}, None, "compute"),
        ({}, None, None),
    ],
)
def test_a_share_is_left_out_where_a_cache_served(
    given: dict[str, Any], share: float | None, bound: str | None
) -> None:
    found = kept(**given)
    assert (found.get("share"), found.get("bound")) == (share, bound)


def test_text_has_tokens_a_second() -> None:
    assert kept(num_tokens=128)["tokens/s"] == 128.0
    assert "tokens/s" not in kept()


@pytest.mark.parametrize(
    ("kernels", "has_kernel"),
    [((), False), (("mla_decode",), True), (("mla_decode", "rope"), True), (("mla_decode", "add"), False)],
)
def test_what_is_no_op_names_the_kernels_that_it_stands_on(
    kernels: tuple[str, ...], has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results.native, "has_kernels", lambda: True)
    monkeypatch.setattr(results.native, "kernel_ops", lambda: frozenset({"mla_decode", "rope"}))
    monkeypatch.setattr(results, "device_name", str)
    found = results.record(
        Case(op="step", step="forward", shape="B=1", dtype=torch.float32, kernels=kernels),
        device=torch.device("cuda"),
        ours=Timing(seconds=1.0, method="graph"),
        peers={},
        ceilings=Ceilings(flops_per_second=2e12, bytes_per_second=4e9),
    )
    assert found["has_kernel"] is has_kernel


def test_a_run_is_held_against_the_best_ceilings_of_all_of_it() -> None:
    records = [kept(num_bytes=4e9), kept(num_bytes=2e9), kept(flops=1e12), {"op": "fim"}]
    records[1]["ceiling_GB/s"], records[2]["ceiling_TFLOP/s"] = 8.0, 4.0
    records.append({**kept(num_bytes=1e9, flops=1e12, is_warm=True), "dtype": "bfloat16"})
    results.settle({"benchmarks": [{"extra_info": one} for one in records]})
    assert [one.get("share") for one in records] == [50.0, 25.0, 25.0, None, 50.0]
    assert [one.get("ceiling_TFLOP/s") for one in records] == [4.0, 4.0, 4.0, None, 2.0]
    assert {one["ceiling_GB/s"] for one in records if "share" in one} == {8.0}


def test_a_gpu_that_is_not_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert results.unmeasured_gpu(cpu) == "torch found no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    for archs, end in (((), "has no kernels"), (("80", "90a"), "has kernels for sm_80, sm_90a alone")):
        monkeypatch.setattr(native, "cuda_archs", lambda archs=archs: archs)
        assert results.unmeasured_gpu(cpu) == f"NVIDIA T4 is there and was not measured: this build {end}"
    assert results.unmeasured_gpu(torch.device("cuda")) is None
