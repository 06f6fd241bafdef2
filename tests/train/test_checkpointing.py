"""Checkpoints: whole or absent, the newest kept, failures told."""

import errno
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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


def test_the_thread_that_writes_waits_for_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*arguments: object) -> None:
        raise AssertionError("a wait for the training's stream")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", wait)
    saved(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (9, 10, 11):
        writer.save(progress(step), state(float(step)))
    writer.close()
    assert [step for step, _ in completed(tmp_path)] == [10, 11]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_old_one_that_cannot_be_deleted_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, "device or resource busy", str(path))

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    writer.wait()
    with monkeypatch.context() as busy:
        busy.setattr(checkpointing, "_remove", refuse)
        writer.save(progress(2), state(2.0))
        writer.wait()
    assert "the old checkpoint step-000000001 could not be deleted: [Errno 16]" in caplog.text
    assert [step for step, _ in completed(tmp_path)] == [1, 2]
    writer.save(progress(3), state(3.0))
    writer.close()
    assert [step for step, _ in completed(tmp_path)] == [3]


def test_half_written_checkpoints_are_never_read_and_go_away(tmp_path: Path) -> None:
    for name in ("step-000000003.tmp", "step-3", "step-000000004.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000009.tmp").write_text("a file")
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


def test_a_wrong_position_in_a_file_is_told_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_position(*arguments: object, **more: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(checkpointing, "save", wrong_position)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(1), state(1.0))
    with pytest.raises(OSError, match=r"No space left on device.*there is none yet"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def saved(directory: Path) -> Path:
    """A checkpoint of `state(1.0)` after step 1."""
    writer = CheckpointWriter(directory, keep=1)
    writer.save(replace(progress(1), waiting={"steps": 1, "loss": 0.1}), state(1.0))
    writer.close()
    return completed(directory)[-1][1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"must have \d+ bytes, got 50"),
        (flip, "does not add up to its sha256"),
        (Path.unlink, "is not there"),
    ],
)
def test_a_damaged_checkpoint_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], None], message: str
) -> None:
    path = saved(tmp_path)
    damage(path / name)
    loaded = state(0.0)
    with pytest.raises(RuntimeError, match=rf"1 cannot be read \({name} {message}\); .*the one before"):
        load_state(path, loaded)
    assert not loaded["weight"].any()
    assert capfd.readouterr().err == ""


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    chance = random.Random(1)
    for _ in range(60):
        file = path / chance.choice([".metadata", "__0_0.distcp", "progress.json"])
        whole = file.read_bytes()
        bit = chance.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(RuntimeError, match="cannot be read"):
            load_state(path, state(0.0))
        file.write_bytes(whole)
    load_state(path, state(0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", r"progress\.json must hold a JSON object, got Expecting"),
        ('{"step": 3}', r"progress\.json does not add up"),
        ("[]", "got a list"),
    ],
)
def test_a_damaged_progress_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    path = saved(tmp_path)
    (path / "progress.json").unlink()
    if text is not None:
        (path / "progress.json").write_text(text)
    for read in (read_progress, lambda path: load_state(path, state(0.0))):
        with pytest.raises(RuntimeError, match=rf"1 cannot be read \(.*{message}.*the one before"):
            read(path)


def test_a_file_in_place_of_a_checkpoint_is_an_error_and_goes_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / "step-000000001").write_text("a file")
    with pytest.raises(RuntimeError, match=r"step-000000001 cannot be read"):
        read_progress(tmp_path / "step-000000001")
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(progress(2), state(1.0))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_a_tensor_that_was_not_saved_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(RuntimeError, match=r"cannot be read .*other"):
        load_state(path, state(0.0) | {"other": torch.zeros(1)})
