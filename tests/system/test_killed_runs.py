"""Runs that are killed, at any moment, and started again end with the weights of a run that never was."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dscoder.config.train import (
    BatchConfig,
    CheckpointConfig,
    PretrainConfig,
    ReportConfig,
    ScheduleConfig,
)
from dscoder.testing.tiny_run import TINY_MOE, tiny_windows
from dscoder.train.metrics import MEASURED

NUM_STEPS = 60
TIMEOUT_S = 300.0
pytestmark = pytest.mark.slow

Condition = Callable[[Path], bool]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("data"))


def start(windows: Path, out: Path) -> "subprocess.Popen[str]":
    config = PretrainConfig(
        data=str(windows),
        out=str(out),
        model=TINY_MOE,
        num_steps=NUM_STEPS,
        batch=BatchConfig(sequences=6, ramp_from=4, ramp_tokens=64 * 100, micro=4),
        schedule=ScheduleConfig(kind="cosine", max_lr=1e-3, warmup_steps=5),
        checkpoint=CheckpointConfig(every=3, keep=2),
        report=ReportConfig(log_every=1, eval_every=10, eval_windows=4),
        num_threads=1,  # the machine may be busy with other tests
    )
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(config)))
    command = [sys.executable, "-m", "dscoder", "pretrain", "--config", str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def whole_run(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(windows, out))
    return out


def reports(out: Path) -> list[dict[str, float]]:
    """What a run reported, without how fast it was."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def assert_same_run(out: Path, whole_run: Path) -> None:
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (whole_run / name).read_bytes()
    assert reports(out) == reports(whole_run)


def during_a_save(out: Path) -> bool:
    return any((out / "checkpoints").glob("*.tmp"))


def past_step(step: int) -> Condition:
    def is_past(out: Path) -> bool:
        path = out / "metrics.jsonl"
        return path.is_file() and path.read_text().count("\n") > step

    return is_past


def kill_when(process: "subprocess.Popen[str]", out: Path, condition: Condition, *, delay: float) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition(out):
        assert process.poll() is None, f"the run ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.communicate()


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(
    windows: Path, whole_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    chance = random.Random(20260101)
    moments: list[tuple[Condition, float]] = [
        (past_step(1), 0.0),  # before the first checkpoint
        (during_a_save, 0.0),
        (past_step(chance.randrange(10, 20)), chance.random() * 0.03),
        (during_a_save, 0.005),
        (past_step(chance.randrange(25, 50)), chance.random() * 0.03),
    ]
    for condition, delay in moments:
        kill_when(start(windows, out), out, condition, delay=delay)
    finish(start(windows, out))
    assert_same_run(out, whole_run)


def test_sigterm_saves_and_says_how_to_go_on(windows: Path, whole_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(windows, out)
    while not past_step(7)(out):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM, errors
    told = re.search(r"after step (\d+); a checkpoint is in", errors)
    assert told is not None, errors
    assert (out / "checkpoints" / f"step-{int(told[1]):09d}").is_dir()
    finish(start(windows, out))
    assert_same_run(out, whole_run)


def test_a_finished_run_started_again_does_nothing(windows: Path, whole_run: Path) -> None:
    before = (whole_run / "manifest.json").stat().st_mtime_ns
    errors = finish(start(windows, whole_run))
    assert "is finished already" in errors
    assert (whole_run / "manifest.json").stat().st_mtime_ns == before
