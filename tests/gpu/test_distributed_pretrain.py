"""Runs over NCCL: ranks have the curve of one GPU, and go on where another number of them stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.config.train import PretrainConfig
from dscoder.testing.compare import assert_same_curve
from dscoder.testing.ranks import run_ranks
from dscoder.testing.tiny_run import tiny_windows
from dscoder.train.checkpointing import completed
from dscoder.train.ranks import Ranks
from tests.models.sharded import tiny
from tests.train.ranks_at_work import curve, run_all, run_until, run_with, tiny_config

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAYOUTS = [
    pytest.param(1, 1, id="one rank"),
    pytest.param(2, 1, id="two ranks", marks=two_gpus),
    pytest.param(2, 2, id="two ranks with experts of their own", marks=two_gpus),
]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("data"))


def on_gpus(windows: Path, out: Path, *, expert: int = 1) -> PretrainConfig:
    model = replace(tiny("tiny_moe"), vocab_size=512, max_positions=64)
    return tiny_config(windows, out, expert=expert, model=model, precision="bf16", device="cuda")


@pytest.mark.parametrize(("num_ranks", "expert"), LAYOUTS)
def test_ranks_on_gpus_have_the_curve_of_one_gpu(
    windows: Path, tmp_path: Path, num_ranks: int, expert: int
) -> None:
    run_with(on_gpus(windows, tmp_path / "alone"), Ranks())
    run_ranks(run_all, [on_gpus(windows, tmp_path / "ranks", expert=expert)], num_ranks=num_ranks)
    assert_same_curve(curve(tmp_path / "ranks"), curve(tmp_path / "alone"), dtype=torch.bfloat16)


@two_gpus
def test_two_gpus_go_on_where_one_stopped_and_back(windows: Path, tmp_path: Path) -> None:
    config = on_gpus(windows, tmp_path, expert=1)
    for num_ranks, stop_after in [(1, 2), (2, 3), (1, None)]:
        run_ranks(run_until, config, stop_after, num_ranks=num_ranks)
    assert completed(tmp_path / "checkpoints")[-1][0] == 8
    assert [report["step"] for report in curve(tmp_path) if "loss" in report] == list(range(1, 9))
