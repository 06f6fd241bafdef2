"""Checkpoints: whole or absent, the newest kept, failures told."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dscoder.train import checkpointing
from dscoder.train.checkpointing import CheckpointWriter, Progress, completed, load_state, read_progress


def progress(step: int) -> Progress:
    return Progress(step=step, num_sequences=step * 2, num_tokens=step * 16, num_threads=1)


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((3, 5), value),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "step": torch.tensor(value),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


def poll(writer: CheckpointWriter) -> None:
    """Ask for a failure, as a run does after each step, until there is one."""
    for _ in range(10_000):
        writer.raise_if_failed()
        time.sleep(0.001)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = state(1.5) | {"random": torch.randn(100)}
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(7), saved)
    writer.close()
    [(step, path)] = completed(tmp_path)
    assert step == 7
    assert read_progress(path) == progress(7)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    load_state(path, loaded)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_what_changes_after_the_save_is_not_saved(tmp_path: Path) -> None:
    live = state(1.0)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), live)
    for tensor in live.values():
        tensor.zero_()
    writer.close()
    loaded = state(0.0)
    load_state(completed(tmp_path)[-1][1], loaded)
    assert torch.equal(loaded["weight"], torch.ones(3, 5))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (9, 10, 11):
        writer.save(progress(step), state(float(step)))
    writer.close()
    assert [step for step, _ in completed(tmp_path)] == [10, 11]
    assert len(list(tmp_path.iterdir())) == 2


def test_half_written_checkpoints_are_never_read_and_go_away(tmp_path: Path) -> None:
    for name in ("step-000000003.tmp", "step-3", "step-000000004.old"):
        (tmp_path / name).mkdir()
    assert completed(tmp_path) == []
    CheckpointWriter(tmp_path, keep=1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004.old", "step-3"]


def test_a_save_that_dies_before_the_rename_leaves_nothing_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, value: object) -> None:
        raise OSError(errno.EIO, "input/output error", str(path))

    monkeypatch.setattr(checkpointing, "write_json", die)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    with pytest.raises(OSError, match=r"could not be written .*there is none yet"):
        writer.close()
    assert completed(tmp_path) == []


def test_a_full_disk_is_told_with_the_checkpoint_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    writer.wait()

    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # DCP syncs its file before it is done: there a full disk shows at the latest.
    monkeypatch.setattr(os, "fsync", no_space)
    writer.save(progress(2), state(2.0))
    with pytest.raises(
        OSError, match=r"No space left on device.*the latest whole one is step-000000001"
    ) as error:
        poll(writer)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [step for step, _ in completed(tmp_path)] == [1]
    writer.save(progress(2), state(2.0))
    writer.close()
    assert [step for step, _ in completed(tmp_path)] == [2]


def test_a_failure_on_a_disk_too_small_is_told_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_position(*arguments: object, **more: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(checkpointing, "save", wrong_position)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    with pytest.raises(OSError, match=r"No space left on device.*there is none yet"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, name: str) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    writer.close()
    path = completed(tmp_path)[-1][1]
    (path / name).write_bytes((path / name).read_bytes()[:50])
    with pytest.raises(RuntimeError, match=r"step-000000001 cannot be read \(.*the one before"):
        load_state(path, state(0.0))


def test_a_tensor_that_was_not_saved_is_an_error(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    writer.close()
    with pytest.raises(RuntimeError, match=r"cannot be read .*other"):
        load_state(completed(tmp_path)[-1][1], state(0.0) | {"other": torch.zeros(1)})
