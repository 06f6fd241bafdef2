"""The stage `long_context`: positions are stretched once, and only when asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.checkpoint import load_pretrained
from dscoder.config import ModelConfig, preset
from dscoder.config.train import LongContextConfig, PretrainConfig, ScheduleConfig
from dscoder.testing.tiny_run import TINY_WINDOW, config_for, tiny_windows
from dscoder.train import pretrain


@pytest.fixture(scope="module")
def finished(windows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain.run(config_for(windows, tmp_path_factory.mktemp("finished") / "run", num_steps=2))


def long_config(earlier: Path, windows: Path, out: Path) -> PretrainConfig:
    return config_for(
        windows,
        out,
        model=None,
        init_from=str(earlier / "model"),
        stage="long_context",
        num_steps=3,
        schedule=ScheduleConfig(kind="constant", max_lr=1e-3, warmup_steps=0),
    )


@pytest.fixture(scope="module")
def long_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("long"), window=4 * TINY_WINDOW)


def test_long_context_switches_yarn_on_from_an_earlier_run(
    finished: Path, long_windows: Path, tmp_path: Path
) -> None:
    model = load_pretrained(pretrain.run(long_config(finished, long_windows, tmp_path)) / "model")
    yarn = model.config.rope.yarn
    assert yarn is not None
    assert (yarn.factor, yarn.original_max_positions, yarn.beta_slow, yarn.beta_fast) == (40, 64, 1, 32)
    assert model.config.max_positions == 64 * 40


def test_a_second_stage_keeps_the_first_ones_positions(
    finished: Path, long_windows: Path, tmp_path: Path
) -> None:
    first = pretrain.run(long_config(finished, long_windows, tmp_path / "first"))
    longer = tiny_windows(tmp_path / "longer", window=16 * TINY_WINDOW)
    second = pretrain.run(long_config(first, longer, tmp_path / "second"))
    configs = [load_pretrained(out / "model").config for out in (first, second)]
    assert configs[0] == configs[1]


def test_without_the_stage_longer_windows_are_refused(
    finished: Path, long_windows: Path, tmp_path: Path
) -> None:
    config = replace(long_config(finished, long_windows, tmp_path), stage="pretrain")
    with pytest.raises(ValueError, match=r"must be <= 64, the model's max_positions, got 256"):
        pretrain.run(config)


def test_grouped_query_models_are_stretched_linearly(
    windows: Path, long_windows: Path, tmp_path: Path
) -> None:
    dense: ModelConfig = replace(preset("tiny_dense"), vocab_size=512, num_layers=1, max_positions=64)
    first = pretrain.run(config_for(windows, tmp_path / "first", model=dense, num_steps=2))
    config = replace(
        long_config(first, long_windows, tmp_path / "second"),
        long_context=LongContextConfig(linear_factor=4.0, theta=100000.0),
    )
    rope = load_pretrained(pretrain.run(config) / "model").config.rope
    assert (rope.linear_factor, rope.theta, rope.yarn) == (4.0, 100000.0, None)
