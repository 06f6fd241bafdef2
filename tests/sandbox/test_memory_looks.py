"""What the supervisor's looks at the memory see, where no control group helps them."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from dscoder.sandbox import box
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import MIB, Program, Verdict
from tests.sandbox.conftest import SMALL

Attack = Callable[..., Verdict]

FORKS = """
import ctypes, mmap, os, platform, socket, threading, time
def in_children(count, action, seconds):
    for _ in range(count):
        if os.fork() == 0:
            kept = action()
            time.sleep(60)
    time.sleep(seconds)
"""


@pytest.fixture(autouse=True, params=["root", "one_id"])
def looks_alone(
    request: pytest.FixtureRequest, without_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no control group can be made, with and without a user of the program's own."""
    if request.param == "one_id":
        monkeypatch.setattr(box, "is_root", lambda: False)


SHARED_MAPS = """
def action():
    shared = mmap.mmap(-1, 50 << 20)
    time.sleep(0.3)  # so that nothing else grows meanwhile
    for _ in range(50): shared.write(b"x" * (1 << 20))
    return shared
in_children(4, action, 60)
"""
# The first thread ends by itself, which leaves the process a zombie to look at while the other lives on.
ZOMBIE_LEADERS = """
libc = ctypes.CDLL(None)
def hold():
    time.sleep(0.3)  # until the other has ended
    kept = b"x" * (50 << 20)
    time.sleep(60)
def action():
    threading.Thread(target=hold).start()
    libc.syscall(60 if platform.machine() == "x86_64" else 93, 0)
in_children(4, action, 60)
"""
SOCKETS = """
def action():
    kept = []
    for _ in range(100):
        pair = socket.socketpair()
        for end in pair:
            end.setblocking(False)
            try:
                while True: end.send(b"x" * 4096)
            except BlockingIOError:
                kept.append(end)
    return kept
in_children(6, action, 60)
"""
HIDDEN_PROCESSES = """
def action():
    ctypes.CDLL(None).prctl(4, 0)
    return b"x" * (50 << 20)
in_children(4, action, 60)
"""


@pytest.mark.parametrize(
    "source",
    [SHARED_MAPS, ZOMBIE_LEADERS, SOCKETS, HIDDEN_PROCESSES],
    ids=["shared_maps", "zombie_leaders", "sockets", "hidden"],
)
def test_memory_is_seen_wherever_it_lies(attack: Attack, source: str) -> None:
    verdict = attack(FORKS + source, limits=replace(SMALL, time=30.0))
    assert verdict.outcome == "memory_limit", (verdict.detail, verdict.stderr, verdict.peak_memory)


def test_pages_shared_after_a_fork_count_once(attack: Attack) -> None:
    source = """
kept = b"x" * (70 << 20)
in_children(4, lambda: None, 1.5)
print(len(kept))
"""
    verdict = attack(FORKS + source)
    assert verdict.outcome == "passed", verdict.detail
    assert 70 * MIB < verdict.peak_memory < 120 * MIB


@pytest.mark.parametrize(
    "action",
    [
        'subprocess.run(["true"])',
        "pid = os.fork()\n    if pid == 0: os._exit(0)\n    os.waitpid(pid, 0)",
    ],
    ids=["subprocess", "fork"],
)
def test_a_process_that_dies_during_a_look_holds_nothing(attack: Attack, action: str) -> None:
    source = f"""
import os, subprocess, time
kept = b"x" * (92 << 20)
end = time.monotonic() + 3.0
while time.monotonic() < end:
    {action}
"""
    verdict = attack(source, limits=replace(SMALL, time=30.0))
    assert verdict.outcome == "passed", verdict.detail
    assert verdict.peak_memory < SMALL.memory


def test_a_map_shared_by_all_counts_once(attack: Attack) -> None:
    source = """
shared = mmap.mmap(-1, 70 << 20)
for _ in range(70): shared.write(b"x" * (1 << 20))
in_children(4, lambda: shared.find(b"y"), 1.5)
"""
    verdict = attack(FORKS + source)
    assert verdict.outcome == "passed", verdict.detail


@pytest.mark.usefixtures("full_isolation")
def test_the_memory_of_a_vfork_counts_once() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source = """
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
int main() {
    char* kept = malloc(90 << 20);
    memset(kept, 1, 90 << 20);
    if (vfork() == 0) { usleep(500000); _exit(0); }
    return kept[5] - 1;
}
"""
    verdict = run(Program(language="c", source=source), SMALL)
    assert verdict.outcome == "passed", (verdict.detail, verdict.compile)
    assert verdict.wall > 0.4


def test_a_program_has_room_for_files_but_not_without_end(attack: Attack) -> None:
    source = """
import os
files = []
try:
    while True: files.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    print(len(files))
"""
    assert 200 < int(attack(source).stdout) < 256


def test_looks_at_many_processes_leave_time_for_them(attack: Attack) -> None:
    # Each look reads the page tables of every process.
    source = """
kept = bytearray(60 << 20)
in_children(20, lambda: None, 1.5)
end = time.process_time() + 0.3
while time.process_time() < end: pass
"""
    verdict = attack(FORKS + source, limits=replace(SMALL, time=8.0))
    assert verdict.outcome == "passed", verdict.detail
