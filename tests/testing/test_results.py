import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from dscoder.testing import results

NOON = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)


def test_a_run_is_named_by_its_device_and_its_time_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (141 GB)")
    path = results.result_file(Path("r"), torch.device("cuda"), NOON)
    assert path == Path("r/nvidia_h200_141_gb/2026-11-20T12-00-00.json")
    east = NOON.astimezone(timezone(timedelta(hours=8)))
    assert results.result_file(Path("r"), torch.device("cuda"), east) == path


def test_runs_on_cpus_share_a_folder() -> None:
    assert results.result_file(Path("r"), torch.device("cpu"), NOON).parent == Path("r/cpu")


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


def test_the_module_makes_the_folder_and_writes_the_path(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dscoder.testing.results"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip())
    assert path.parts[:2] == ("benchmarks", "results")
    assert path.suffix == ".json"
    assert (tmp_path / path.parent).is_dir()
