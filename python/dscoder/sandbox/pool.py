"""Many programs at once, bounded by cores and memory; verdicts in order or as they come."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self

from dscoder.sandbox import machine
from dscoder.sandbox.run import DEFAULT_LIMITS, run
from dscoder.sandbox.verdict import Isolation, Limits, Program, Verdict

_MEMORY_SHARE = 0.5  # of the machine's or the container's, where the caller names no amount
_WAITING_PER_WORKER = 2  # programs taken from a stream ahead of need


def default_memory() -> int:
    """Bytes that all programs of a pool may take together where nothing else is said."""
    return int(machine.memory() * _MEMORY_SHARE)


class _Budget:
    """An amount that threads take parts of, in the order in which they ask: none waits for ever."""

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self._free = amount
        self._asking: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, part: float) -> None:
        me = object()
        with self._changed:
            self._asking.append(me)
            self._changed.wait_for(lambda: self._asking[0] is me and self._free >= part)
            self._asking.popleft()
            self._free -= part
            self._changed.notify_all()

    def put_back(self, part: float) -> None:
        with self._changed:
            self._free += part
            self._changed.notify_all()


class _Ticket:
    """One submitted program: its future, and the descriptor that calls it off."""

    def __init__(self) -> None:
        self.future: Future[Verdict] | None = None
        self._file = os.eventfd(0, os.EFD_CLOEXEC)
        self._is_open = True
        self._lock = threading.Lock()

    @property
    def file(self) -> int:
        with self._lock:
            if not self._is_open:  # a program that could not be submitted, but was queued all the same
                raise CancelledError
            return self._file

    def call_off(self) -> None:
        if self.future is not None:
            self.future.cancel()
        with self._lock:  # once closed, the number may be another file's
            if self._is_open:
                os.eventfd_write(self._file, 1)

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            os.close(self._file)


class Pool:
    """Sandboxes side by side. A context manager: leaving it waits, or calls everything off on an exception.

    Args:
        num_workers: programs at one time; None: one a core that this process, and its container, may use.
        memory: bytes that the limits of the running programs may add up to; None: half of what the machine
            has, or the container may take.
        isolation: as for `run`, for all of them.
    """

    def __init__(
        self, *, num_workers: int | None = None, memory: int | None = None, isolation: Isolation = "full"
    ) -> None:
        self.num_workers = machine.num_cores() if num_workers is None else num_workers
        if self.num_workers < 1:
            raise ValueError(f"Pool: num_workers must be >= 1, got {num_workers}")
        self.isolation = isolation
        self._memory = _Budget(default_memory() if memory is None else memory)
        self._threads = ThreadPoolExecutor(self.num_workers, thread_name_prefix="sandbox")
        self._tickets: set[_Ticket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what runs, or kill it if the block failed."""
        if error is not None:
            self.cancel()
        self.close()

    def close(self) -> None:
        """Take no more programs and wait for those there are."""
        self._threads.shutdown(wait=True)

    def cancel(self) -> None:
        """Call off what waits (its future raises CancelledError) and kill what runs ("sandbox_error")."""
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.call_off()

    def submit(self, program: Program, limits: Limits = DEFAULT_LIMITS) -> Future[Verdict]:
        """Run one program when there is room; ValueError if there never will be."""
        ticket = self._submit(program, limits)
        assert ticket.future is not None
        return ticket.future

    def run_many(self, programs: Iterable[Program], limits: Limits = DEFAULT_LIMITS) -> list[Verdict]:
        """The verdict of each program, in their order."""
        verdicts = dict(self.stream(programs, limits))
        return [verdicts[idx] for idx in range(len(verdicts))]

    def stream(
        self, programs: Iterable[Program], limits: Limits = DEFAULT_LIMITS
    ) -> Iterator[tuple[int, Verdict]]:
        """(index of the program, its verdict), as they come.

        Programs are taken from the iterable as there is room for them. A stream that is closed before its end
        kills what it has started.
        """
        running: dict[Future[Verdict], tuple[int, _Ticket]] = {}
        source = enumerate(programs)
        try:
            while self._fill(running, source, limits):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    idx, _ = running.pop(future)
                    yield idx, future.result()
        finally:
            for _, ticket in running.values():
                ticket.call_off()

    def _fill(
        self,
        running: dict[Future[Verdict], tuple[int, _Ticket]],
        source: Iterator[tuple[int, Program]],
        limits: Limits,
    ) -> bool:
        """Take programs from `source` while there is room for them; False if none is running then."""
        while len(running) < self.num_workers * _WAITING_PER_WORKER:
            item = next(source, None)
            if item is None:
                break
            ticket = self._submit(item[1], limits)
            assert ticket.future is not None
            running[ticket.future] = (item[0], ticket)
        return bool(running)

    def _submit(self, program: Program, limits: Limits) -> _Ticket:
        if limits.memory > self._memory.amount:
            raise ValueError(
                f"Pool: the memory of a program must be <= {self._memory.amount:g} bytes, the pool's, "
                f"got {limits.memory:g}"
            )
        ticket = _Ticket()
        with self._lock:
            self._tickets.add(ticket)
        try:
            ticket.future = self._threads.submit(self._run, program, limits, ticket)
        except BaseException:
            self._forget(ticket)
            raise
        ticket.future.add_done_callback(lambda _: self._forget(ticket))
        return ticket

    def _forget(self, ticket: _Ticket) -> None:
        with self._lock:
            self._tickets.discard(ticket)
        ticket.close()

    def _run(self, program: Program, limits: Limits, ticket: _Ticket) -> Verdict:
        self._memory.take(limits.memory)
        try:
            return run(program, limits, isolation=self.isolation, cancel=ticket.file)
        finally:
            self._memory.put_back(limits.memory)
