"""What becomes of a sandbox whose launcher dies, forks, or calls it off."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox import box, process
from dscoder.sandbox import run as run_module
from dscoder.sandbox.cgroup import find_hierarchies
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program, Verdict
from tests.sandbox.conftest import SMALL, living

NUM_KILLS = 40  # at random moments, and each of POINTS beside
POINTS = ("start", "wait_for", "map_users", "add", "ending")

# Kills launchers, one after another, before and after each step of a start and at moments spread over it and
# the run that follows, and prints their process ids. Bubblewrap and the supervisor go by names that hold a
# word, so that they can be told from everybody else's.
KILLED_AT_RANDOM = """
import os, random, signal, sys, time
from dscoder.sandbox import box, process
from dscoder.sandbox.cgroup import Group
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program

bubblewrap, word, num_kills, points = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split(",")
box.find_bubblewrap = lambda: bubblewrap
box._SUPERVISOR_INSIDE = f"/{word}"
chance = random.Random(1)
homes = dict(start=process, wait_for=box.Supervised, map_users=box, add=Group, ending=box.Supervised)
program = Program(source="import time; time.sleep(60)", args=(word,))


def die_at(name, is_before):
    real = getattr(homes[name], name)

    def step(*arguments, **named):
        if not is_before:
            real(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(homes[name], name, step)


for name, is_before in [(name, is_before) for name in points for is_before in (True, False)]:
    child = os.fork()
    if child == 0:
        if name == "ending" and not is_before:
            program = Program(source="pass")
        die_at(name, is_before)
        run(program)
        os._exit(1)
    print(child)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
for _ in range(num_kills):
    child = os.fork()
    if child == 0:
        run(program)
    print(child)
    time.sleep(chance.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def wait_until_dead(word: str, *, seconds: float = 5.0) -> list[int]:
    """Who is alive after so long, at most, with `word` on the command line."""
    deadline = time.monotonic() + seconds
    while living(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    return living(word)


@pytest.fixture
def word(tmp_path: Path) -> Iterator[str]:
    """A word on the command lines of what must be dead after the test."""
    found = f"word{tmp_path.name}{os.getpid()}".replace("_", "")
    yield found
    left = living(found)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.mark.usefixtures("full_isolation")
def test_a_launcher_killed_at_any_moment_leaves_neither_process_nor_group(tmp_path: Path, word: str) -> None:
    bubblewrap = shutil.which("bwrap")
    assert bubblewrap is not None
    (tmp_path / word).symlink_to(bubblewrap)
    arguments = [str(tmp_path / word), word, str(NUM_KILLS), ",".join(POINTS)]
    command = [sys.executable, "-uc", KILLED_AT_RANDOM, *arguments]
    launchers = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert len(launchers) == NUM_KILLS + 2 * len(POINTS)
    assert wait_until_dead(word) == []
    run_module._hierarchies.cache_clear()  # as in a process that has yet to start its first sandbox
    assert run(Program(source="pass"), SMALL).is_passed
    mounts, membership = (Path("/proc/self", name).read_text() for name in ("mounts", "cgroup"))
    for hierarchy in find_hierarchies(mounts, membership):
        for folder in hierarchy.root.glob("dscoder-sandboxes-*"):
            assert folder.name.split("-")[2] not in launchers, folder


def fork_while_starting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes forked, as by another thread, while the pipes to a sandbox are open on both ends."""
    forked: list[int] = []
    start = process.start

    def fork_and_start(*parts: object) -> int:
        forked.append(os.fork())
        if forked[-1] == 0:
            time.sleep(20)
            os._exit(0)
        return start(*parts)

    monkeypatch.setattr(process, "start", fork_and_start)
    return forked


@pytest.mark.usefixtures("full_isolation")
def test_a_fork_elsewhere_in_the_launcher_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(Program(source="pass"), SMALL).is_passed
    forked = fork_while_starting(monkeypatch)
    begin = time.monotonic()
    verdict = run(Program(source="print('done')"), SMALL)
    elapsed = time.monotonic() - begin
    for pid in forked:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (verdict.outcome, verdict.stdout) == ("passed", "done\n")
    assert elapsed < 5.0


def called_off_after(seconds: float) -> int:
    cancel = os.eventfd(0)
    threading.Timer(seconds, os.eventfd_write, (cancel, 1)).start()
    return cancel


def test_a_start_can_be_called_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str) -> None:
    fake = tmp_path / word
    fake.write_text("#!/bin/sh\nsleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setattr(box, "find_bubblewrap", lambda: str(fake))
    begin = time.monotonic()
    cancel = called_off_after(0.3)
    verdict = run(Program(source="pass"), SMALL, cancel=cancel)
    os.close(cancel)
    assert (verdict.outcome, verdict.detail) == ("sandbox_error", "cancelled")
    assert time.monotonic() - begin < 4.0


def test_a_start_that_cannot_be_watched_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str
) -> None:
    fake = tmp_path / word
    fake.write_text("#!/bin/sh\nsleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setattr(box, "find_bubblewrap", lambda: str(fake))
    started: list[int] = []
    start = process.start
    monkeypatch.setattr(process, "start", lambda *parts: started.append(start(*parts)) or started[-1])

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(process.os, "pidfd_open", refuse)
    verdict = run(Program(source="pass"), SMALL)
    assert verdict.outcome == "sandbox_error"
    assert "Too many open files" in verdict.detail
    with pytest.raises(ChildProcessError):  # it is dead, and buried
        os.waitpid(started[0], os.WNOHANG)


def test_news_that_are_none_are_the_sandboxs_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/bash\nwhile [ "$1" != --info-fd ]; do shift; done\necho "[]" >&"$2"; sleep 600\n')
    fake.chmod(0o755)
    monkeypatch.setattr(box, "find_bubblewrap", lambda: str(fake))
    verdict = run(Program(source="pass"), SMALL)
    assert verdict.outcome == "sandbox_error"
    assert "child's process id, got b'[]" in verdict.detail


# ---- isolation "rlimits", without control groups to help ----


def weak_program(word: str) -> Program:
    return Program(language="bash", source='bash -c "sleep 60; : $1" "$1" &\nsleep 60', args=(word,))


@pytest.mark.usefixtures("without_groups")
def test_calling_off_ends_a_weakly_isolated_program(word: str) -> None:
    cancel = called_off_after(0.5)
    begin = time.monotonic()
    verdict = run(weak_program(word), replace(SMALL, time=60.0), isolation="rlimits", cancel=cancel)
    os.close(cancel)
    assert (verdict.outcome, verdict.detail) == ("sandbox_error", "cancelled")
    assert living(word) == []
    assert time.monotonic() - begin < 4.0


WEAK_LAUNCHER = """
import sys
from dscoder.sandbox import run as run_module
from dscoder.sandbox.verdict import Limits, Program

run_module._hierarchies = lambda _: ()
source = 'bash -c "sleep 60; : $1" "$1" &\\nsleep 60'
program = Program(language="bash", source=source, args=(sys.argv[1],))
run_module.run(program, Limits(time=60.0), isolation="rlimits")
"""


def test_a_weakly_isolated_program_dies_with_its_launcher(word: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WEAK_LAUNCHER, word]) as launcher:
        while len(living(word)) < 3:  # the launcher, the program and its child
            assert launcher.poll() is None
            time.sleep(0.02)
        launcher.kill()
    assert wait_until_dead(word) == []


def test_a_weakly_isolated_program_dies_with_its_supervisor(
    word: str, without_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Verdict] = []
    program = Program(language="bash", source=f"exec -a {word} sleep 60")
    thread = threading.Thread(target=lambda: seen.append(run(program, SMALL, isolation="rlimits")))
    started: list[int] = []
    start = process.start
    monkeypatch.setattr(process, "start", lambda *parts: started.append(start(*parts)) or started[-1])
    thread.start()
    while not living(word):
        time.sleep(0.02)
    os.kill(started[0], signal.SIGKILL)
    thread.join()
    assert (seen[0].outcome, seen[0].is_answer) == ("sandbox_error", False)
    assert wait_until_dead(word) == []
