"""Fine-tuning that is killed, while examples are written or weights move, ends with the same bytes."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dscoder.config.lora import LoraConfig
from dscoder.config.train import CheckpointConfig
from dscoder.testing.tiny_sft import sft_config_for, tiny_base, tiny_dialogues

TIMEOUT_S = 300.0
pytestmark = pytest.mark.slow


def start(folder: Path, out: Path) -> "subprocess.Popen[str]":
    config = sft_config_for(
        folder / "base" / "model",
        folder / "d.jsonl",
        out,
        lora=LoraConfig(rank=4, dropout=0.1),
        num_steps=30,
        checkpoint=CheckpointConfig(every=3),
    )
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asdict(config)))
    command = [sys.executable, "-m", "dscoder", "sft", "--config", str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors


def kill_when(process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"the run ended before it could be killed: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.communicate()


def test_a_run_killed_in_each_of_its_parts_ends_with_the_same_adapter(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    tiny_dialogues(tmp_path / "d.jsonl", count=3000)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(tmp_path, whole))
    kill_when(start(tmp_path, cut), (cut / "examples" / "started.json").exists)
    assert not (cut / "examples" / "manifest.json").exists()
    kill_when(start(tmp_path, cut), (cut / "checkpoints" / "step-000000003").exists)
    kill_when(start(tmp_path, cut), (cut / "checkpoints" / "step-000000012").exists)
    finish(start(tmp_path, cut))
    for name in (
        "examples/train/mask-00000.npy",
        "adapter/adapter_model.safetensors",
        "model/model.safetensors",
    ):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
