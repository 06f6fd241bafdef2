"""A directory that appears whole or not at all."""

import fcntl
import os
import subprocess
import sys

import pytest

from dscoder.checkpoint import replace
from dscoder.checkpoint.replace import new_directory


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def put(target, **files):
    with new_directory(target) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)


def test_nothing_is_there_until_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "model"
    with new_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert contents(target) == {"a": "1"}
    assert os.listdir(target.parent) == ["model"]


def test_what_was_there_is_replaced_whole(tmp_path):
    put(tmp_path / "model", a="1", b="2")
    put(tmp_path / "model", a="3")
    assert contents(tmp_path / "model") == {"a": "3"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_system_without_exchange_replaces_too(tmp_path, monkeypatch):
    put(tmp_path / "model", a="1", b="2")
    monkeypatch.setattr(replace, "_exchange", lambda one, other: False)
    put(tmp_path / "model", a="3")
    assert contents(tmp_path / "model") == {"a": "3"}
    assert os.listdir(tmp_path) == ["model"]


def test_an_exception_leaves_the_old_one(tmp_path):
    put(tmp_path / "model", a="1")
    with pytest.raises(TypeError, match="must be str"):
        put(tmp_path / "model", a="half", b=None)
    assert contents(tmp_path / "model") == {"a": "1"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_stays_and_its_directory_is_replaced(tmp_path):
    put(tmp_path / "real", a="1")
    (tmp_path / "link").symlink_to("real")
    put(tmp_path / "link", a="2")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"a": "2"}


def test_the_directory_has_the_permissions_of_any_other(tmp_path):
    put(tmp_path / "model", a="1")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_writers_of_one_target_are_kept_apart(tmp_path):
    with (
        new_directory(tmp_path / "model") as partial,
        pytest.raises(OSError, match=r"\.model\.partial is being written by another process"),
        new_directory(tmp_path / "model"),
    ):
        pass
    assert not partial.exists()


def test_a_partial_directory_that_moved_meanwhile_is_not_taken(tmp_path, monkeypatch):
    def flock_after_the_other_writer_finished(file, operation):
        (tmp_path / ".model.partial").rename(tmp_path / "model")
        (tmp_path / ".model.partial").mkdir()

    monkeypatch.setattr(fcntl, "flock", flock_after_the_other_writer_finished)
    with pytest.raises(OSError, match="another process"), new_directory(tmp_path / "model"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from dscoder.checkpoint import replace

moment, target = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the move":
    replace._put = die
elif moment == "after the move":
    replace.shutil.rmtree = lambda path, **_: die() if path.name.endswith(".partial") else None
with replace.new_directory(target) as partial:
    (partial / "a").write_text("new")
    (partial / "folder").mkdir()
    if moment == "while writing":
        die()
"""


@pytest.mark.parametrize(
    ("moment", "there"), [("while writing", "old"), ("before the move", "old"), ("after the move", "new")]
)
def test_a_killed_writer_leaves_the_old_or_the_new_and_no_obstacle(tmp_path, moment, there):
    target = tmp_path / "model"
    put(target, a="old")
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(target)], check=False)
    assert killed.returncode == -9
    assert (target / "a").read_text() == there
    assert sorted(os.listdir(tmp_path)) == [".model.partial", "model"]
    put(target, a="next")
    assert contents(target) == {"a": "next"}
    assert os.listdir(tmp_path) == ["model"]
