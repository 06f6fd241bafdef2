"""From a program to its verdict, and what becomes of a sandbox that fails."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.sandbox import box, job, process
from dscoder.sandbox import run as run_module
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict
from tests.sandbox.conftest import SMALL, living

pytestmark = pytest.mark.usefixtures("full_isolation")


def python(source: str, **parts: object) -> Verdict:
    return run(replace(Program(source=source), **parts), SMALL)


def test_exit_status_0_passes() -> None:
    verdict = python("print('hello')")
    assert (verdict.outcome, verdict.stdout, verdict.stderr) == ("passed", "hello\n", "")
    assert (verdict.exit_code, verdict.signal, verdict.isolation) == (0, None, "full")
    assert verdict.is_passed
    assert verdict.is_answer


@pytest.mark.parametrize("half", [chr(0xD800), chr(0xDCFF)], ids=["upper", "lower"])
def test_half_a_character_is_a_mistake_of_the_program(half: str) -> None:
    # Models write them, and a text with one has no UTF-8.
    assert python(f"x = '{half}'").outcome == "runtime_error"
    echo = python("import sys; print(len(sys.argv), sys.stdin.buffer.read())", stdin=half, args=(half,))
    assert (echo.outcome, echo.stdout[:4]) == ("passed", "2 b'")


def test_wall_and_processor_time_and_memory_are_those_of_the_program() -> None:
    source = """
import os, time
end = time.process_time() + 0.3
while time.process_time() < end: pass
if os.fork() == 0:
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
    os._exit(0)
x = b"x" * (50 << 20)
os.wait()
time.sleep(0.5)
"""
    verdict = run(Program(source=source), replace(SMALL, time=30.0))  # a busy machine takes its time
    assert 0.6 <= verdict.cpu < 1.5
    assert 0.8 <= verdict.wall < 30.0
    assert 50 * MIB <= verdict.peak_memory < 90 * MIB


def test_a_failed_assertion_is_not_a_crash() -> None:
    assert python("assert 1 == 2").outcome == "failed"
    assert python("raise KeyError('AssertionError')").outcome == "runtime_error"


def test_the_wrong_output_fails() -> None:
    program = Program(source="print(int(input()) + 1)", stdin="41\n", expected_stdout="42")
    assert run(program, SMALL).outcome == "passed"
    assert run(replace(program, stdin="40\n"), SMALL).outcome == "failed"


def test_the_right_output_with_the_wrong_status_does_not_pass() -> None:
    assert python("print(42)\nraise SystemExit(1)", expected_stdout="42").outcome == "runtime_error"


def test_a_crash_names_its_signal() -> None:
    verdict = python("import os\nos.kill(os.getpid(), 11)")
    assert (verdict.outcome, verdict.signal, verdict.exit_code) == ("runtime_error", signal.SIGSEGV, None)
    assert verdict.detail == "killed by SIGSEGV"


def test_arguments_and_further_files_reach_the_program() -> None:
    files = {"main.py": "import sys, part.half\nprint(part.half.x, sys.argv[1:])", "part/half.py": "x = 1"}
    verdict = run(Program(files=files, args=("a b", "\udcff")), SMALL)
    assert verdict.stdout == "1 ['a b', '\\udcff']\n"


def test_a_large_input_is_read_whole() -> None:
    verdict = python("import sys\nprint(len(sys.stdin.buffer.read()))", stdin="x" * 3_000_000)
    assert verdict.stdout == "3000000\n"


def test_output_that_is_no_text_is_kept_readable() -> None:
    verdict = python("import os\nos.write(1, b'a\\xff\\x00b')\nos.write(2, bytes(range(256)))")
    assert verdict.stdout == "a\\xff\x00b"
    assert verdict.stdout.encode("utf-8")
    assert verdict.stderr.endswith("\\xfe\\xff")


def test_installed_packages_are_not_seen() -> None:
    assert "ModuleNotFoundError" in python("import pytest").stderr
    assert python("import json, decimal, ssl; exit()").outcome == "passed"


def test_a_library_call_without_the_kernels_help_still_works() -> None:
    source = """
import multiprocessing, subprocess, tempfile, threading, asyncio
def double(x): return 2 * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        assert pool.map(double, [1, 2]) == [2, 4]
    assert subprocess.run(["echo", "hi"], capture_output=True).stdout == b"hi\\n"
    with tempfile.TemporaryFile() as file: file.write(b"x")
    assert asyncio.run(asyncio.sleep(0, 7)) == 7
"""
    verdict = python(source)
    assert verdict.outcome == "passed", verdict.stderr


@pytest.mark.usefixtures("without_groups")
@pytest.mark.parametrize("is_root", [True, False])
def test_without_control_groups_the_limits_hold(monkeypatch: pytest.MonkeyPatch, is_root: bool) -> None:
    if not is_root:
        monkeypatch.setattr(box, "is_root", lambda: False)
    source = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = b"x" * (40 << 20)
        time.sleep(60)
time.sleep(60)
"""
    verdict = python(source)
    assert verdict.outcome == "memory_limit"
    assert verdict.wall < SMALL.time


def test_a_user_with_one_id_is_isolated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box, "is_root", lambda: False)
    source = """
import os
for n in range(1, 65):
    try:
        os.kill(1, n)
    except OSError:
        pass
for name in ("mem", "fd", "environ"):
    try:
        open(f"/proc/1/{name}", "rb").read(1)
        print(name)
    except OSError:
        pass
print(os.getuid())
"""
    verdict = python(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "1000\n"), verdict.stderr


# ---- the sandbox fails, and the program is not to blame ----


def assert_no_answer(verdict: Verdict, *words: str) -> None:
    assert verdict.outcome == "sandbox_error"
    assert not verdict.is_answer
    for word in words:
        assert word in verdict.detail


def test_a_missing_bubblewrap_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.shutil, "which", lambda _: None)
    assert_no_answer(python("pass"), "bubblewrap", "apt-get install", "rlimits")


def fake_bubblewrap(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    fake = folder / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(box, "find_bubblewrap", lambda: str(fake))


def test_refused_namespaces_are_told_in_bubblewraps_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_bubblewrap(monkeypatch, tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    assert_no_answer(python("pass"), "No permissions to create new namespace", "rlimits")


def test_a_sandbox_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_bubblewrap(monkeypatch, tmp_path, "sleep 600")
    monkeypatch.setattr(job, "GRACE", 0.2)
    begin = time.monotonic()
    verdict = run(Program(source="pass"), replace(SMALL, time=0.3))
    assert_no_answer(verdict, "time")
    assert time.monotonic() - begin < 5.0


def test_a_supervisor_that_dies_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Verdict] = []
    thread = threading.Thread(target=lambda: seen.append(python("import time\ntime.sleep(60)")))
    started: list[int] = []
    start = process.start
    monkeypatch.setattr(process, "start", lambda *parts: started.append(start(*parts)) or started[-1])
    thread.start()
    time.sleep(0.5)
    os.kill(started[0], signal.SIGKILL)
    thread.join()
    assert_no_answer(seen[0], "report")


def test_programs_die_with_the_process_that_asked_for_them(tmp_path: Path) -> None:
    source = f"""
from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Program
run(Program(source="import time\\ntime.sleep(60)", args=("{tmp_path}",)))
"""
    with subprocess.Popen([sys.executable, "-c", source]) as asking:
        while len(living(str(tmp_path))) < 2:  # the asking process and the program
            time.sleep(0.05)
        asking.kill()
    deadline = time.monotonic() + 5.0
    while living(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(str(tmp_path)) == []


def test_a_program_that_cannot_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_module.find("python")
    broken = replace(found, paths={"python3": Path("/usr/bin/no-such-interpreter")})
    monkeypatch.setattr(run_module, "find", lambda _: broken)
    assert_no_answer(python("pass"), "no-such-interpreter", "No such file")


def test_a_running_program_can_be_called_off() -> None:
    cancel = os.eventfd(0)
    threading.Timer(0.5, os.eventfd_write, (cancel, 1)).start()
    begin = time.monotonic()
    verdict = run(Program(source="import time\ntime.sleep(60)"), SMALL, cancel=cancel)
    assert_no_answer(verdict, "cancelled")
    assert time.monotonic() - begin < 4.0
    os.close(cancel)


def test_no_control_group_is_left() -> None:
    python("pass")
    folders = [hierarchy.root for hierarchy in run_module._hierarchies(os.getpid())]
    assert [path for folder in folders for path in folder.iterdir() if path.is_dir()] == []


def children() -> set[str]:
    """The processes that this one started, dead ones that it has not waited for among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is gone by now
            _, parent, *_ = path.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(path.parent.name)
    return found


def test_no_descriptor_and_no_child_is_left() -> None:
    python("pass")
    before = os.listdir("/proc/self/fd")
    others = children()  # of other tests, such as a server of forks
    for _ in range(3):
        python("pass")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert children() <= others


def test_programs_and_verdicts_travel_between_processes() -> None:
    program = Program(files={"main.py": "print(1)"})
    assert pickle.loads(pickle.dumps(program)) == program
    verdict = run(program, SMALL)
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    assert pickle.loads(pickle.dumps(Program(source=""))) == Program(source="")


# ---- wrong arguments ----


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"language must be one of .*python.*, got 'cobol'"):
        run(Program(language="cobol", source=""))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "got neither"),
        ({"source": "", "files": {"a": ""}}, "got both"),
        ({"files": {"../a": ""}}, r"got '\.\./a'"),
        ({"files": {"/a": ""}}, "got '/a'"),
        ({"files": {"": ""}}, "got ''"),
        ({"source": "", "args": ("x" * 200_000,)}, "got 200000 and 200000"),
        ({"source": "", "args": ("a\0b",)}, "NUL"),
    ],
)
def test_a_program_that_cannot_be_is_refused(parts: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Program(**parts)


@pytest.mark.parametrize("name", ["time", "memory", "output", "processes", "disk", "compile_time"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_limits_nothing_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be > 0 and finite, got {value}"):
        Limits(**{name: value})


def test_an_unknown_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="outcome must be one of"):
        Verdict(outcome="good")
