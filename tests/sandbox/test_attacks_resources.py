"""Programs that take more than they may: processes, memory, output, disk, time."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dscoder.sandbox.verdict import MIB, Verdict
from tests.sandbox.conftest import SMALL

Attack = Callable[..., Verdict]
BRIEF = replace(SMALL, time=1.0)


def test_a_fork_bomb_is_bounded_and_ends_at_the_deadline(attack: Attack) -> None:
    source = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""
    assert attack(source, limits=BRIEF).outcome == "time_limit"


def test_no_more_processes_start_than_may(attack: Attack) -> None:
    source = """
import os, time
for i in range(1000):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except BlockingIOError:
        print(i)
        break
"""
    verdict = attack(source)
    assert verdict.outcome == "passed"
    assert SMALL.processes - 3 <= int(verdict.stdout) < SMALL.processes


def test_threads_count_as_processes(attack: Attack) -> None:
    source = """
import threading, time
for i in range(1000):
    try:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError:
        print(i)
        break
"""
    verdict = attack(source)
    assert int(verdict.stdout) < SMALL.processes


def test_one_large_allocation_is_a_memory_limit(attack: Attack) -> None:
    verdict = attack("x = bytearray(10**10)")
    assert (verdict.outcome, verdict.is_answer) == ("memory_limit", True)


def test_memory_taken_bit_by_bit_is_a_memory_limit(attack: Attack) -> None:
    verdict = attack("x = []\nwhile True: x.append(bytearray(b'x' * 1000000))")
    assert verdict.outcome == "memory_limit"
    assert verdict.peak_memory <= SMALL.memory + 32 * MIB


def test_memory_of_many_processes_adds_up(attack: Attack) -> None:
    source = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        x = b"x" * (30 << 20)
        time.sleep(60)
time.sleep(60)
"""
    verdict = attack(source)
    assert verdict.outcome == "memory_limit"
    assert verdict.wall < SMALL.time


def test_a_swallowed_memory_error_does_not_raise_the_limit(attack: Attack) -> None:
    source = """
kept = []
while True:
    try:
        kept.append(bytearray(b"x" * 1000000))
    except MemoryError:
        print(len(kept))
        break
"""
    verdict = attack(source)
    assert verdict.outcome in ("passed", "memory_limit")
    assert verdict.peak_memory <= SMALL.memory + 32 * MIB


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_output_flood_is_cut_off(attack: Attack, stream: str) -> None:
    verdict = attack(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)")
    assert verdict.outcome == "output_limit"
    assert len(getattr(verdict, stream)) == SMALL.output
    assert verdict.wall < SMALL.time


def test_a_flood_from_a_child_is_cut_off(attack: Attack) -> None:
    verdict = attack("import os\nif os.fork() == 0:\n while True: os.write(1, b'x' * 65536)\nos.wait()")
    assert verdict.outcome == "output_limit"


@pytest.mark.parametrize("folder", [".", "/tmp", "/dev/shm"])
def test_the_disk_is_full_at_its_limit(attack: Attack, folder: str) -> None:
    source = f"""
import errno
written = 0
try:
    for i in range(100):
        with open(f"{folder}/{{i}}", "wb", buffering=0) as file:
            while True:
                step = file.write(b"x" * 1000000)
                written += step
                if step < 1000000:
                    break
except OSError as error:
    print(errno.errorcode[error.errno], written)
"""
    verdict = attack(source)
    name, written = verdict.stdout.split()
    assert name in ("ENOSPC", "EFBIG")
    assert int(written) <= SMALL.disk


def test_a_file_larger_than_the_disk_is_refused(attack: Attack) -> None:
    verdict = attack("f = open('sparse', 'wb')\nf.truncate(10**12)")
    assert verdict.outcome == "runtime_error"
    assert "File too large" in verdict.stderr


def test_countless_empty_files_count_as_memory(attack: Attack) -> None:
    source = """
import os
i = 0
while True:
    os.close(os.open(str(i), os.O_CREAT))
    i += 1
"""
    verdict = attack(source, limits=replace(SMALL, memory=48 * MIB))
    assert verdict.outcome in ("memory_limit", "runtime_error")
    assert verdict.wall < SMALL.time


def test_folders_nested_without_end_are_gone_with_the_sandbox(attack: Attack) -> None:
    source = "import os\nfor _ in range(5000):\n os.mkdir('d')\n os.chdir('d')"
    assert attack(source).outcome == "passed"


@pytest.mark.parametrize("body", ["pass", "__import__('time').sleep(1)"], ids=["busy", "asleep"])
def test_an_endless_loop_ends_at_the_deadline(attack: Attack, body: str) -> None:
    verdict = attack(f"while True: {body}", limits=BRIEF)
    assert verdict.outcome == "time_limit"
    assert BRIEF.time <= verdict.wall < BRIEF.time + 2.0


def test_signals_cannot_be_ignored_past_the_deadline(attack: Attack) -> None:
    source = """
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
"""
    assert attack(source, limits=BRIEF).outcome == "time_limit"


def test_processor_time_has_a_limit_of_its_own(attack: Attack) -> None:
    verdict = attack("while True: pass", limits=replace(SMALL, time=20.0, cpu_time=1.0))
    assert verdict.outcome == "time_limit"
    assert verdict.wall < 15.0


def test_limits_cannot_be_raised(attack: Attack) -> None:
    source = """
import resource
for name in ("AS", "NPROC", "FSIZE", "CPU"):
    number = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(number)[1]
    try:
        resource.setrlimit(number, (hard + 1, hard + 1))
        print("raised", name)
    except (ValueError, OSError):
        pass
"""
    verdict = attack(source)
    assert (verdict.outcome, verdict.stdout) == ("passed", "")


def test_a_storm_of_zombies_is_buried(attack: Attack) -> None:
    source = """
import os, time
end = time.monotonic() + 0.5
started = 0
while time.monotonic() < end:
    try:
        if os.fork() == 0:
            try:
                os.fork()
            finally:
                os._exit(0)
        started += 1
    except BlockingIOError:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
print(started > 30)
"""
    assert attack(source).stdout == "True\n"


def test_huge_arguments_hurt_nobody(attack: Attack) -> None:
    source = """
import os, sys
try:
    os.execv(sys.executable, [sys.executable, "-c", "pass"] + ["x" * 100000] * 500)
except OSError as error:
    print(error.strerror)
"""
    assert attack(source).stdout == "Argument list too long\n"
