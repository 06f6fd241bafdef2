"""A check in a process of its own: it passes, fails, hangs or dies there."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dscoder.testing.aside import Aside

# Read by the process as well; it keeps the process's own state.
STATE = {"is fit": True}


def prepare() -> None:
    if not STATE["is fit"]:
        raise RuntimeError("unfit")


def note_process(path: Path) -> None:
    path.write_text(str(os.getpid()), encoding="utf-8")


def fail(message: str, is_fit: bool) -> None:
    STATE["is fit"] = is_fit
    raise ValueError(message)


def hang() -> None:
    time.sleep(3600)


def die() -> None:
    os._exit(7)


@pytest.fixture(scope="module")
def aside() -> Iterator[Aside]:
    found = Aside(prepare, limit_s=5.0)
    yield found
    found.close()


def process_of(aside: Aside, path: Path) -> int:
    aside.run(note_process, path)
    return int(path.read_text(encoding="utf-8"))


def test_checks_share_a_process_of_their_own(aside: Aside, tmp_path: Path) -> None:
    assert process_of(aside, tmp_path / "a") == process_of(aside, tmp_path / "b") != os.getpid()


@pytest.mark.parametrize("is_fit", [True, False])
def test_a_failure_is_told_and_ends_the_process_only_if_it_is_unfit(
    is_fit: bool, aside: Aside, tmp_path: Path
) -> None:
    before = process_of(aside, tmp_path / "a")
    with pytest.raises(AssertionError, match=r"^ValueError: some reason\n\nTraceback"):
        aside.run(fail, "some reason", is_fit)
    assert (process_of(aside, tmp_path / "a") == before) == is_fit


def test_one_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    aside = Aside(prepare, limit_s=0.5)
    before = process_of(aside, tmp_path / "a")
    with pytest.raises(TimeoutError, match=r"^hang: did not end within 0\.5 s$"):
        aside.run(hang)
    assert aside.num_hung == 1
    assert not Path(f"/proc/{before}").exists()
    assert process_of(aside, tmp_path / "a") != before
    aside.close()


def test_one_that_dies_is_named_and_the_next_one_runs(aside: Aside, tmp_path: Path) -> None:
    before = process_of(aside, tmp_path / "a")
    with pytest.raises(ChildProcessError, match=r"^die: its process ended with 7$"):
        aside.run(die)
    assert process_of(aside, tmp_path / "a") != before
