import subprocess
from pathlib import Path

import torch

from dscoder.testing import results


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
