"""The command under torchrun: one run on two ranks, and what a reader of its output sees."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dscoder.config.parallel import ParallelConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, PretrainConfig, ReportConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_run import config_for, tiny_windows

TIMEOUT_S = 300.0
pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("data"))


FAILS_ONCE = """
import os, torch
from dscoder.runtime.mesh import open_mesh
with open_mesh(expert=2, replicate=1, device="cpu", timeout=60) as mesh:
    mesh.barrier()
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if (attempt, mesh.rank) == ("0", 1):
        raise KeyError("no such thing")
    print(f"attempt {attempt} adds up to {mesh.all_sum(torch.ones(1)).item()}; lost: {mesh.lost_ranks()}")
"""


def torchrun(*words: str) -> "subprocess.Popen[str]":
    """`torchrun --nproc-per-node 2 ...`, with all that it says in one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def pretrain(config: PretrainConfig, *words: str) -> "subprocess.Popen[str]":
    """The command, under torchrun."""
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(config)))
    return torchrun("-m", "dscoder", "pretrain", "--config", str(path), *words)


def end(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=TIMEOUT_S)[0]


def lines_with(text: str, words: str) -> Sequence[str]:
    return [line for line in text.splitlines() if words in line]


def await_lines(process: "subprocess.Popen[str]", path: Path, num_lines: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not (path.is_file() and path.read_text().count("\n") >= num_lines):
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rank_process(agent: int, *, rank: int) -> int:
    """The process of `rank` among the children of torchrun's agent."""
    threads = Path(f"/proc/{agent}/task").iterdir()
    children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    [found] = [
        pid for pid in children if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    ]
    return int(found)


def test_a_run_is_killed_goes_on_and_ends(windows: Path, tmp_path: Path) -> None:
    config = config_for(
        windows,
        tmp_path / "run",
        num_steps=60,
        batch=BatchConfig(sequences=4, micro=2),
        checkpoint=CheckpointConfig(every=5),
        report=ReportConfig(log_every=1, eval_every=30, eval_windows=4, tensorboard="off", plot="off"),
        parallel=ParallelConfig(expert=2, timeout=60.0),
        device="cpu",
    )
    process = pretrain(config)
    metrics = tmp_path / "run" / "metrics.jsonl"
    await_lines(process, metrics, 13)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to the ranks
    told = end(process)
    assert len(lines_with(told, "stopped by SIGTERM after step")) == 1, told  # all stop, one says so

    process = pretrain(config)
    told = end(process)
    assert process.returncode == 0, told
    assert len(lines_with(told, "going on from")) == 1
    layout = "2 ranks on cpu, replicate 1 x expert_shard 1 x expert 2, backend gloo, transport collective, "
    [line] = lines_with(told, layout)
    assert line.endswith("micro-batches a step 2, a rank 1, precision fp32, threads a rank 1")
    manifest = read_manifest(tmp_path / "run", command="pretrain")
    assert manifest["counts"]["steps"] == 60
    assert manifest["facts"]["layout"] == {"replicate": 1, "expert_shard": 1, "expert": 2}
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61))


def test_a_config_that_does_not_fit_is_refused_by_every_rank(windows: Path, tmp_path: Path) -> None:
    config = config_for(windows, tmp_path / "run", device="cpu")
    process = pretrain(config, "--batch.micro", "4")
    told = end(process)
    assert process.returncode == 1
    for rank in (0, 1):
        assert lines_with(told, f"dscoder pretrain [rank {rank}]: batch: micro must be <= 3"), told
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_is_named_although_torchrun_ends_the_others(windows: Path, tmp_path: Path) -> None:
    config = config_for(
        windows,
        tmp_path / "run",
        num_steps=100_000,
        batch=BatchConfig(sequences=4, micro=2),
        checkpoint=CheckpointConfig(every=5),
        report=ReportConfig(log_every=1, eval_every=100_000, tensorboard="off", plot="off"),
        parallel=ParallelConfig(expert=2, timeout=60.0),
        device="cpu",
    )
    process = pretrain(config)
    await_lines(process, tmp_path / "run" / "metrics.jsonl", 7)
    os.kill(rank_process(process.pid, rank=1), signal.SIGKILL)
    told = end(process)
    assert process.returncode == 1
    assert lines_with(told, "dscoder pretrain [rank 0]: rank 1 is gone: its heartbeat stopped"), told


def test_ranks_that_are_started_again_meet_anew(tmp_path: Path) -> None:
    script = tmp_path / "fails_once.py"
    script.write_text(FAILS_ONCE)
    process = torchrun("--max-restarts", "1", str(script))
    told = end(process)
    assert process.returncode == 0, told
    assert len(lines_with(told, "attempt 1 adds up to 2.0; lost: []")) == 2, told
