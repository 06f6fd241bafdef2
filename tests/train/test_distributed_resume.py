"""Runs on many ranks that are stopped or killed go on: on as many ranks with the same bits, on others too."""

import os
import random
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dscoder.config.train import PretrainConfig
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.compare import assert_same_curve
from dscoder.testing.ranks import end_ranks, run_ranks
from dscoder.train import checkpointing, pretrain
from dscoder.train.checkpointing import completed, read_progress
from dscoder.train.ranks import Ranks
from tests.train.ranks_at_work import curve, die_after, run_until, run_until_with, run_with, tiny_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def whole(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The curve of one process that nobody disturbed, without evaluations."""
    out = tmp_path_factory.mktemp("whole")
    run_with(tiny_config(windows, out), Ranks(), lambda step: None)
    return [report for report in curve(out) if "loss" in report]


def losses(out: Path) -> list[dict[str, float]]:
    return [report for report in curve(out) if "loss" in report]


def test_a_run_moves_from_layout_to_layout(
    windows: Path, whole: Sequence[dict[str, float]], tmp_path: Path
) -> None:
    config = tiny_config(windows, tmp_path, expert=2)
    # The signal comes during an evaluation. One process hears of it then; many with the step that follows.
    for num_ranks, expert, replicate, last in [(4, 2, 2, 2), (2, 2, 1, 4), (1, 1, 1, 6), (4, 4, 1, None)]:
        parallel = replace(config.parallel, expert=expert, replicate=replicate)
        stop_after = None if last is None else last - (num_ranks > 1)
        ended = run_ranks(run_until, replace(config, parallel=parallel), stop_after, num_ranks=num_ranks)
        if last is None:
            assert ended == [None] * num_ranks
            continue
        assert all(f"stopped by SIGTERM after step {last}" in end for end in ended)
        step, path = completed(tmp_path / "checkpoints")[-1]
        saved = read_progress(path)
        assert (step, saved.num_sequences) == (last, 7 * last)
        assert saved.layout == {
            "replicate": replicate,
            "expert_shard": num_ranks // expert // replicate,
            "expert": expert,
        }
    assert_same_curve(losses(tmp_path), whole)
    manifest = read_manifest(tmp_path, command="pretrain")
    assert manifest["counts"] == {"steps": 8, "sequences": 56, "tokens": 56 * 64}


def whole_and_cut(whole_run: PretrainConfig, cut_run: PretrainConfig) -> None:
    """On every rank: a run, and the same stopped at an odd step and gone on with."""
    with pretrain.open_ranks(whole_run) as ranks:
        for config, stop_after in [(whole_run, None), (cut_run, 2), (cut_run, None)]:
            run_until_with(config, ranks, stop_after)


def test_on_the_same_layout_a_run_goes_on_with_the_same_bits(windows: Path, tmp_path: Path) -> None:
    configs = [tiny_config(windows, tmp_path / name, expert=2) for name in ("whole", "cut")]
    run_ranks(whole_and_cut, *configs, num_ranks=2)
    assert [step for step, _ in completed(tmp_path / "cut" / "checkpoints")] == [6, 8]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")


def test_after_a_rank_is_killed_the_rest_say_so_and_fewer_go_on(
    windows: Path, whole: Sequence[dict[str, float]], tmp_path: Path
) -> None:
    chance = random.Random(20260307)
    rank, step = chance.randrange(4), chance.randrange(5, 8)
    config = tiny_config(windows, tmp_path, expert=2)
    ended = end_ranks(die_after, config, rank, step, num_ranks=4, limit=60)
    assert [end.status for end in ended] == [-9 if other == rank else 1 for other in range(4)]
    lost = rf"LostRankError: .*\brank {rank}\b.* is gone"
    assert all(re.search(lost, end.error) for end in ended if end is not ended[rank]), ended
    assert completed(tmp_path / "checkpoints")  # step 2 was saved whole before step 4 began to be
    run_ranks(run_until, config, num_ranks=2)
    assert_same_curve(losses(tmp_path), whole)


def die_in_save(config: PretrainConfig, rank: int, number: int) -> None:
    """On every rank: one run, in which a rank is killed when it has written its files of a checkpoint."""
    describe, saves = checkpointing.describe_files, []

    def describe_or_die(path: Path, of_rank: int) -> dict[str, dict[str, int | str]]:
        saves.append(path)
        if (of_rank, len(saves)) == (rank, number):
            os.kill(os.getpid(), signal.SIGKILL)
        return describe(path, of_rank)

    with mock.patch.object(checkpointing, "describe_files", describe_or_die):
        run_until(config)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_during_a_save_leaves_the_checkpoint_before(
    windows: Path, whole: Sequence[dict[str, float]], tmp_path: Path, rank: int
) -> None:
    config = tiny_config(windows, tmp_path, expert=2)
    ended = end_ranks(die_in_save, config, rank, 2, num_ranks=2, limit=60)
    assert [end.status for end in ended] == ([-9, 1] if rank == 0 else [1, -9])
    assert re.search(rf"LostRankError: .*\brank {rank}\b.* is gone", ended[1 - rank].error)
    assert [step for step, _ in completed(tmp_path / "checkpoints")] == [2]
    run_ranks(run_until, config, num_ranks=2)
    assert_same_curve(losses(tmp_path), whole)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
