"""What two ranks that share the experts report together: the loads of one process, and their own times."""

from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.config.train import PretrainConfig, ProfileConfig
from dscoder.testing.ranks import run_ranks
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train import pretrain
from dscoder.train.metrics import METRICS, read_metrics
from tests.train.ranks_at_work import tiny_config

pytestmark = pytest.mark.dist

assert TINY_MOE.moe is not None
DROPPING = replace(TINY_MOE, moe=replace(TINY_MOE.moe, num_groups=2, num_groups_kept=2, capacity_factor=1.0))
LOADS = ("expert_load_max", "expert_load_mean", "dropped_share")
STEPS = 2


def config_of(windows: Path, out: Path, *, expert: int) -> PretrainConfig:
    return tiny_config(windows, out, expert=expert, model=DROPPING, num_steps=STEPS)


def run_and_listen(config: PretrainConfig) -> int:
    """On every rank; returns how many reports it was told of."""
    told: list[object] = []
    with pretrain.open_ranks(config) as ranks:
        pretrain.run(config, on_metrics=told.append, ranks=ranks)
    return len(told)


def test_two_ranks_report_as_one_process_does(windows: Path, tmp_path: Path) -> None:
    pretrain.run(config_of(windows, tmp_path / "alone", expert=1))
    together = replace(
        config_of(windows, tmp_path / "together", expert=2), profile=ProfileConfig(start=2, steps=1)
    )
    assert run_ranks(run_and_listen, together, num_ranks=2) == [STEPS, 0]

    alone, both = (read_metrics(tmp_path / name / METRICS) for name in ("alone", "together"))
    assert [line["step"] for line in both] == [line["step"] for line in alone] == [1, 2]
    # The weights of the first step are the same, so are the choices, and what is dropped of each micro-batch.
    assert {name: both[0][name] for name in LOADS} == {name: alone[0][name] for name in LOADS}
    assert 0 < both[0]["dropped_share"] < 1
    assert "rank_load_max" not in alone[0]
    for line in both:
        assert 1 <= line["rank_load_mean"] <= line["rank_load_max"] <= 2
        assert 0 < line["dispatch_share"] < 1
        assert 0 < line["combine_share"] < 1
        assert line["tokens_per_second"] > 0
        assert line["peak_memory_gib"] > 0

    folder = tmp_path / "together" / "profile" / "steps-000000002-000000002"
    traces = {path.name for path in folder.glob("*.trace.json.gz")}
    assert traces == {f"rank-{rank}-of-2.trace.json.gz" for rank in (0, 1)}
