"""The ranks of `dscoder pretrain`: which layouts are refused, and how a stop ends them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.config import MoeConfig
from dscoder.config.parallel import ParallelConfig
from dscoder.testing.tiny_run import TINY_MOE, config_for
from dscoder.train import pretrain
from dscoder.train.run import StoppedError


@pytest.mark.parametrize(("expert", "replicate"), [(4, 1), (1, 2)])
def test_a_layout_of_many_ranks_without_torchrun_says_how_to_start(expert: int, replicate: int) -> None:
    config = config_for(Path("d"), Path("o"), parallel=ParallelConfig(expert=expert, replicate=replicate))
    wanted = f"must be 1 for one process, got {expert} and {replicate}; start the command with torchrun"
    with pytest.raises(ValueError, match=wanted), pretrain.open_ranks(config):
        raise AssertionError("there are no ranks")


@pytest.mark.parametrize(
    ("moe", "message"),
    [(None, "expert must be 1 for a model without experts, got 8"), (TINY_MOE.moe, "expert must divide")],
)
def test_a_model_to_go_on_from_must_go_with_the_layout(
    windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moe: MoeConfig | None, message: str
) -> None:
    first = config_for(windows, tmp_path / "first", model=replace(TINY_MOE, moe=moe), num_steps=1)
    pretrain.run(first)
    source = str(tmp_path / "first" / "model")
    second = config_for(windows, tmp_path / "second", model=None, init_from=source)
    # Stands for eight ranks, which are refused when they have read the model's config.
    monkeypatch.setattr(pretrain, "_check_layout", lambda *_: None)
    with pytest.raises(ValueError, match=message):
        pretrain.run(replace(second, parallel=ParallelConfig(expert=8)))


def test_a_stop_is_a_good_end_to_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []

    @contextmanager
    def open_mesh(**_: object) -> Iterator[None]:
        try:
            yield
        except BaseException:
            ends.append("failed")
            raise
        ends.append("done")

    monkeypatch.setattr(pretrain, "launched_ranks", lambda: 2)
    monkeypatch.setattr(pretrain, "open_mesh", open_mesh)
    config = config_for(Path("d"), Path("o"))
    stop = StoppedError(signal.SIGTERM, step=3, directory=Path("o"))
    with pytest.raises(StoppedError) as told, pretrain.open_ranks(config):
        raise stop
    assert told.value is stop
    with pytest.raises(KeyError), pretrain.open_ranks(config):
        raise KeyError("no such thing")
    assert ends == ["done", "failed"]
