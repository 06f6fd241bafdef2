"""Isolation "rlimits": what it still holds, that it must be asked for, and that every verdict says so."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox import box, weak
from dscoder.sandbox import run as run_module
from dscoder.sandbox.run import run
from dscoder.sandbox.toolchains import Toolchain, find
from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict
from tests.sandbox.conftest import SMALL, living

SYSTEM_PYTHON = Path("/usr/bin/python3")


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the system's interpreter, for root's own may lie where a user without rights cannot go."""
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"{SYSTEM_PYTHON} is not there")
    found = find("python")
    assert isinstance(found, Toolchain)
    monkeypatch.setattr(run_module, "find", lambda _: replace(found, paths={"python3": SYSTEM_PYTHON}))


def run_weakly(source: str, *args: str, limits: Limits = SMALL) -> Verdict:
    return run(Program(source=source, args=args), limits, isolation="rlimits")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """A word on the command line of whatever must be dead after the test."""
    yield str(tmp_path)
    assert living(str(tmp_path)) == []


@pytest.mark.usefixtures("reachable")
def test_the_verdict_says_how_it_came_about() -> None:
    verdict = run_weakly("print('hi')")
    assert (verdict.outcome, verdict.stdout, verdict.isolation) == ("passed", "hi\n", "rlimits")
    assert run_weakly("while True: pass", limits=replace(SMALL, time=0.5)).isolation == "rlimits"


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("while True: pass", "time_limit"),
        ("import time\nwhile True: time.sleep(1)", "time_limit"),
        ("x = []\nwhile True: x.append(b'x' * 1000000 + bytes(len(x)))", "memory_limit"),
        ("while True: print('x' * 60000)", "output_limit"),
        ("import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)", "security"),
        ("import socket\nsocket.socket()", "runtime_error"),
        ("import os\nos.kill(-1, 9)", "runtime_error"),
        ("open('/etc/planted', 'w')", "runtime_error"),
        ("open('/etc/shadow')", "runtime_error"),
        ("import os\nprint(os.environ['SECRET_TOKEN'])", "runtime_error"),
    ],
)
def test_limits_and_the_filter_hold(
    source: str, outcome: str, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    verdict = run_weakly(source, marker, limits=replace(SMALL, time=1.5))
    assert verdict.outcome == outcome, verdict


@pytest.mark.usefixtures("reachable")
def test_a_fork_bomb_is_bounded_and_nothing_is_left(marker: str) -> None:
    source = "import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(0.01)"
    assert run_weakly(source, marker, limits=replace(SMALL, time=1.0)).outcome == "time_limit"


@pytest.mark.usefixtures("reachable")
def test_daemons_die_with_their_program(marker: str) -> None:
    source = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
"""
    assert run_weakly(source, marker).outcome == "passed"


@pytest.mark.usefixtures("reachable", "without_groups")
def test_memory_of_many_processes_adds_up(marker: str) -> None:
    source = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = b"x" * (40 << 20)
        time.sleep(60)
os.wait()
"""
    assert run_weakly(source, marker).outcome == "memory_limit"


@pytest.mark.usefixtures("reachable")
def test_the_folder_of_a_program_is_gone_with_it() -> None:
    source = "import os\nprint(os.getcwd())\nfor _ in range(3000):\n os.mkdir('d')\n os.chdir('d')"
    verdict = run_weakly(source)
    assert verdict.outcome == "passed"
    assert not Path(verdict.stdout.strip()).exists()


SOCKETS = """
import socket, sys
def refused(action, *args):
    try:
        action(*args)
    except OSError:
        return True
    return False
left, right = socket.socketpair()
left.send(b"inside")
assert right.recv(6) == b"inside"
assert refused(socket.socket(socket.AF_UNIX).connect, sys.argv[1])
assert refused(socket.socket(socket.AF_UNIX).connect, "\\0" + sys.argv[2])
assert refused(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM)
assert refused(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)
assert refused(socket.socketpair, socket.AF_UNIX, socket.SOCK_RAW)
"""


@pytest.mark.usefixtures("reachable")
def test_the_hosts_named_sockets_are_out_of_reach(tmp_path: Path) -> None:
    named, hidden = str(tmp_path / "named"), f"dscoder-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for server, address in ((first, named), (second, f"\0{hidden}")):
            server.bind(address)
            server.listen()
        for path in (tmp_path, *tmp_path.parents):
            if path.stat().st_uid == os.getuid() and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o005)
        Path(named).chmod(0o777)
        verdict = run_weakly(SOCKETS, named, hidden)
    assert verdict.outcome == "passed", verdict.stderr


def test_what_a_user_without_rights_cannot_reach_is_the_sandboxs_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").touch(mode=0o755)
    with pytest.raises(box.SandboxError, match=f"cannot enter {closed}: install {closed}/python3 elsewhere"):
        weak.check_reachable(closed / "python3")
    found = find("python")
    assert isinstance(found, Toolchain)
    monkeypatch.setattr(run_module, "find", lambda _: replace(found, paths={"python3": closed / "python3"}))
    monkeypatch.setattr(weak, "user", lambda: 12345)
    verdict = run_weakly("pass")
    assert (verdict.outcome, verdict.isolation, verdict.is_answer) == ("sandbox_error", "rlimits", False)


def test_a_private_user_comes_from_what_the_host_maps() -> None:
    assert box.private_user(5, "0 0 4294967295\n") == 1_610_612_741
    assert box.private_user(5, "0 100000 65536\n") == 20_005
    with pytest.raises(box.SandboxError, match="no user id"):
        box.private_user(5, "0 1000 1\n")
    assert SMALL.memory == 128 * MIB
