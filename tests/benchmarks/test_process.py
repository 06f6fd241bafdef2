"""Commands of a GPU check: their limits, and that none outlives it."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.check.events import Seen, read_events
from benchmarks.check.process import Budget, Runner

SLEEP = "import time; time.sleep(60)"
WITH_CHILD = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print(child.pid, flush=True)
"""


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path, tmp_path / "logs", os.environ)


def is_alive(number: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until_dead(number: int) -> None:
    for _ in range(200):
        if not is_alive(number):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {number} lives on")


def test_output_and_status_come_back_and_are_logged(runner: Runner) -> None:
    ended = runner.run([sys.executable, "-c", "print('out'); raise SystemExit(3)"], name="a", limit=60)
    assert ended.code == 3
    assert ended.output.splitlines()[-1] == "out"
    assert (runner.logs / "a.log").read_text(encoding="utf-8") == ended.output


def test_a_command_ends_at_its_limit_with_what_it_started(runner: Runner) -> None:
    ended = runner.run([sys.executable, "-c", WITH_CHILD + "child.wait()"], name="a", limit=1.5)
    assert ended.code is None
    assert ended.seconds < 10
    wait_until_dead(int(ended.output.split()[-1]))


def test_what_a_command_leaves_running_is_ended(runner: Runner) -> None:
    ended = runner.run([sys.executable, "-c", WITH_CHILD], name="a", limit=60)
    assert ended.code == 0
    wait_until_dead(int(ended.output.split()[-1]))


def test_stopping_ends_what_runs_and_starts_nothing_more(runner: Runner) -> None:
    timer = threading.Timer(0.5, runner.stop)
    timer.start()
    assert runner.run([sys.executable, "-c", SLEEP], name="a", limit=60).code is None
    assert runner.run([sys.executable, "-c", "print('ran')"], name="b", limit=60).code is None
    assert "ran" not in (runner.logs / "b.log").read_text(encoding="utf-8").splitlines()
    timer.join()


def test_a_step_has_what_the_ones_before_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = Budget(500.0)
    now = 150.0
    assert budget.spent() == 50.0
    assert budget.until(0.5) == 200.0
    now = 400.0
    assert budget.until(0.5) == 0.0


def events(path: Path, *lines: dict[str, object], cut: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut, encoding="utf-8")
    return path


def test_a_test_that_took_its_process_down_is_named(tmp_path: Path) -> None:
    path = events(
        tmp_path / "e",
        {"started": "a"},
        {"test": "a", "outcome": "passed", "seconds": 0.1},
        {"started": "b"},
    )
    seen = read_events(path, is_stopped=False)
    assert seen.counts == {"passed": 1, "crashed": 1}
    assert seen.failures == [{"test": "b", "reason": "the process ended inside this test"}]
    assert not seen.is_finished
    assert read_events(path, is_stopped=True).num_bad == 0


def test_a_line_cut_in_the_middle_is_left_out(tmp_path: Path) -> None:
    whole = {"test": "a", "outcome": "failed", "seconds": 0.1, "reason": "no"}
    seen = read_events(events(tmp_path / "e", whole, cut='{"test": "b", "outc'), is_stopped=True)
    assert seen.counts == {"failed": 1}
    assert seen.failures == [{"test": "a", "reason": "no"}]


def test_no_events_are_no_tests(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none", is_stopped=False) == Seen()
