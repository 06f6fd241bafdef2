"""Many at once: order, bounds, calling off."""

import os
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest

from dscoder.sandbox import machine
from dscoder.sandbox import pool as pool_module
from dscoder.sandbox.pool import Pool, default_memory
from dscoder.sandbox.verdict import MIB, Limits, Program, Verdict
from tests.sandbox.conftest import SMALL, living


def program(source: str, *args: str) -> Program:
    return Program(source=source, args=args)


@pytest.mark.usefixtures("full_isolation")
def test_verdicts_come_in_the_order_of_the_programs() -> None:
    programs = [program(f"import time\ntime.sleep({0.3 if i == 0 else 0})\nprint({i})") for i in range(6)]
    with Pool(num_workers=3) as pool:
        assert [verdict.stdout for verdict in pool.run_many(programs, SMALL)] == [f"{i}\n" for i in range(6)]


@pytest.mark.usefixtures("full_isolation")
def test_a_stream_gives_the_first_done_first() -> None:
    programs = [program("import time\ntime.sleep(2)"), program("pass")]
    with Pool(num_workers=2) as pool:
        assert [idx for idx, _ in pool.stream(programs, SMALL)] == [1, 0]


@pytest.mark.usefixtures("full_isolation")
def test_different_outcomes_side_by_side_do_not_mix() -> None:
    sources = [
        "pass",
        "1/0",
        "while True: pass",
        "assert False",
        "import ctypes; ctypes.CDLL(None).ptrace(0)",
    ]
    with Pool(num_workers=4) as pool:
        verdicts = pool.run_many(map(program, sources), replace(SMALL, time=1.5))
    expected = ["passed", "runtime_error", "time_limit", "failed", "security"]
    assert [verdict.outcome for verdict in verdicts] == expected


@pytest.mark.usefixtures("full_isolation")
def test_cancelling_kills_what_runs_and_drops_what_waits(tmp_path: object) -> None:
    marker = str(tmp_path)
    pool = Pool(num_workers=1)
    running, waiting = (pool.submit(program("import time\ntime.sleep(60)", marker), SMALL) for _ in range(2))
    while not living(marker):
        time.sleep(0.02)
    begin = time.monotonic()
    pool.cancel()
    verdict = running.result()
    assert (verdict.outcome, verdict.detail, verdict.is_answer) == ("sandbox_error", "cancelled", False)
    with pytest.raises(CancelledError):
        waiting.result()
    pool.close()
    assert time.monotonic() - begin < 4.0
    assert living(marker) == []


@pytest.mark.usefixtures("full_isolation")
def test_an_exception_in_the_block_kills_what_runs(tmp_path: object) -> None:
    marker = str(tmp_path)

    def fail() -> None:
        with Pool(num_workers=2) as pool:
            pool.submit(program("import time\ntime.sleep(60)", marker), SMALL)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert living(marker) == []


@pytest.mark.usefixtures("full_isolation")
def test_a_stream_closed_early_kills_what_it_started(tmp_path: object) -> None:
    marker = str(tmp_path)
    sources = ["pass", *["import time\ntime.sleep(60)"] * 50]
    with Pool(num_workers=2) as pool:
        for _ in pool.stream((program(source, marker) for source in sources), SMALL):
            break
    assert living(marker) == []


class Counted:
    """Stands for `run`: takes time, and counts how many are at it and what memory they may take."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.most_memory = 0
        self.memory = 0

    def __call__(self, _: Program, limits: object, **__: object) -> Verdict:
        with self.lock:
            self.now += 1
            self.memory += limits.memory
            self.most, self.most_memory = max(self.most, self.now), max(self.most_memory, self.memory)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
            self.memory -= limits.memory
        return Verdict(outcome="passed")


@pytest.mark.parametrize(("memory", "most"), [(100 * MIB, 5), (3 * MIB, 3), (1 * MIB, 1)])
def test_cores_and_memory_bound_how_many_run(monkeypatch: pytest.MonkeyPatch, memory: int, most: int) -> None:
    counted = Counted()
    monkeypatch.setattr(pool_module, "run", counted)
    with Pool(num_workers=5, memory=memory) as pool:
        pool.run_many([program("")] * 20, replace(SMALL, memory=MIB))
    assert counted.most == most
    assert counted.most_memory <= memory


def test_a_stream_takes_programs_only_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "run", Counted())
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield program("")

    with Pool(num_workers=2) as pool:
        stream = pool.stream(endless(), SMALL)
        for _ in range(10):
            next(stream)
        stream.close()
    assert 10 <= taken <= 16


def test_a_program_that_needs_much_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    begin = threading.Event()

    def stand_in(_: Program, limits: Limits, **__: object) -> Verdict:
        begin.wait()
        order.append(limits.memory)
        time.sleep(0.05)
        return Verdict(outcome="passed")

    monkeypatch.setattr(pool_module, "run", stand_in)
    with Pool(num_workers=8, memory=4 * MIB) as pool:
        for memory in (3, 4, *[1] * 6):
            pool.submit(program(""), replace(SMALL, memory=memory * MIB))
            time.sleep(0.05)  # until its worker has asked
        begin.set()
    assert order == [3 * MIB, 4 * MIB, *[MIB] * 6]


def test_a_program_whose_worker_does_not_start_is_not_run_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str | None] = []

    def stand_in(found: Program, *_: object, **__: object) -> Verdict:
        ran.append(found.source)
        return Verdict(outcome="passed")

    monkeypatch.setattr(pool_module, "run", stand_in)
    start = threading.Thread.start
    refusals = iter([True, False])

    def refuse_once(thread: threading.Thread) -> None:
        if next(refusals, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    with Pool(num_workers=1) as pool:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(program("first"), SMALL)
        assert pool.submit(program("second"), SMALL).result().is_passed
    assert ran == ["second"]


def test_a_surprise_in_a_worker_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(*_: object, **__: object) -> Verdict:
        raise KeyError("surprise")

    monkeypatch.setattr(pool_module, "run", stand_in)
    with Pool(num_workers=1, memory=MIB) as pool:
        futures = [pool.submit(program(""), replace(SMALL, memory=MIB)) for _ in range(3)]
        for future in futures:
            with pytest.raises(KeyError, match="surprise"):
                future.result(timeout=5.0)


def test_a_program_that_can_never_run_is_refused() -> None:
    with Pool(num_workers=1, memory=MIB) as pool, pytest.raises(ValueError, match="must be <= "):
        pool.submit(program(""), SMALL)


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers must be >= 1, got 0"):
        Pool(num_workers=0)


def test_by_itself_a_pool_takes_half_of_the_memory_and_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 64 * MIB < default_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(machine, "memory", lambda: 1000)
    monkeypatch.setattr(machine, "num_cores", lambda: 5)
    assert default_memory() == 500
    with Pool() as pool:
        assert pool.num_workers == 5
