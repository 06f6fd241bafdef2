"""How the harness of HumanEval runs programs, written anew: exec() in a forked process, without isolation.

For each program, as there: a manager process for the result, a child process that enters a temporary
folder, sets rlimits, takes dangerous functions out of `os`, swallows the streams, sets a timer and calls
exec(); four threads at a time. Started as a script it reads programs as JSON from stdin and writes the
seconds they took, by the clock and of the processor.
"""

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import ListProxy

MEMORY = 512 << 20
TIMEOUT = 10.0
NUM_WORKERS = 4
_DISABLED = (
    "kill",
    "system",
    "putenv",
    "remove",
    "removedirs",
    "fchdir",
    "setuid",
    "fork",
    "forkpty",
    "killpg",
)


def _take_away_means() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for name in _DISABLED:
        setattr(os, name, None)
    builtins.quit = None  # type: ignore[assignment]
    subprocess.Popen = None  # type: ignore[assignment,misc]


def _time_is_up(*_: object) -> None:
    raise TimeoutError


def _run(source: str, results: "ListProxy[str]") -> None:
    folder = tempfile.mkdtemp()
    remove = shutil.rmtree
    os.chdir(folder)
    _take_away_means()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            signal.signal(signal.SIGALRM, _time_is_up)
            signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
            exec(source, {})
            signal.setitimer(signal.ITIMER_REAL, 0)
        results.append("passed")
    except BaseException as error:
        results.append(f"failed: {error}")
    os.chdir("/")
    remove(folder, ignore_errors=True)


def check(source: str) -> str:
    """What became of one program."""
    results = multiprocessing.Manager().list()
    process = multiprocessing.Process(target=_run, args=(source, results))
    process.start()
    process.join(TIMEOUT + 1)
    if process.is_alive():
        process.kill()
    return results[0] if results else "timed out"


def check_many(sources: list[str]) -> list[str]:
    """What became of each program."""
    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        return list(threads.map(check, sources))


def cpu_seconds() -> float:
    """Processor time of this process and of the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run_in_own_process(sources: list[str]) -> tuple[float, float]:
    """Seconds by the clock and of the processor that a fresh process, with nothing else loaded, takes."""
    command = [sys.executable, __file__]
    answer = subprocess.run(command, input=json.dumps(sources), capture_output=True, text=True, check=True)
    wall, cpu = map(float, answer.stdout.split())
    return wall, cpu


def main() -> None:
    """The script's work."""
    sources = json.load(sys.stdin)
    begin, used = time.perf_counter(), cpu_seconds()
    if any(result != "passed" for result in check_many(sources)):
        raise RuntimeError("a program did not pass")
    sys.stdout.write(f"{time.perf_counter() - begin} {cpu_seconds() - used}")


if __name__ == "__main__":
    main()
