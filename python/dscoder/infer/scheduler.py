"""Which requests run, in which rows of the cache, with which pages, and what is computed next.

Pure bookkeeping: no tensors, no text. Requests run in the order they came, as soon as a row is free and the
pool has pages for all their tokens; pages for what they write come one at a time. When none is left the
youngest one is put back: its row and pages are free, it waits first in line, and its tokens, the drawn ones
included, are computed again when its turn comes. So whoever runs is older than all that wait, and the oldest
is never put back: it ends, and nobody waits for ever. To reserve pages for all that a request may write
would spare the computing again, but most texts end long before their limit.

A prompt is computed in chunks, all but its last token. That one is fed by the decode step which draws the
first new token, so drawing happens in one place. The chunks of a request depend on the request alone.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dscoder.infer.pages import PagePool

NO_ROW = -1


class RowMemory(Protocol):
    """What a cache is told about its rows; `models.cache.Cache` is one."""

    def num_pages_of(self, num_tokens: int) -> int:
        """Pages that a row of `num_tokens` needs."""
        ...

    def assign(self, row: int, pages: Sequence[int]) -> None:
        """Row `row` lies in `pages`."""
        ...

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """Row `target` becomes what row `source` is."""
        ...

    def clear(self, row: int) -> None:
        """Row `row` holds nothing."""
        ...


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """One request as the scheduler sees it: how many tokens it has, and where the cached ones are."""

    request_idx: int
    num_tokens: int  # known: the prompt's and those drawn
    most_tokens: int  # that the cache will ever hold of it
    num_cached: int = 0
    row: int = NO_ROW  # of the cache, while it runs
    pages: list[int] = field(default_factory=list)

    @property
    def num_to_prefill(self) -> int:
        """Tokens that the cache lacks, but for the last: 0 for a job that decodes."""
        return self.num_tokens - 1 - self.num_cached


class Scheduler:
    """The jobs that run, oldest first, and those that wait."""

    def __init__(
        self, jobs: Iterable[Job], *, pool: PagePool, memory: RowMemory, num_rows: int, prefill_chunk: int
    ) -> None:
        if num_rows < 1 or prefill_chunk < 1:
            raise ValueError(
                f"Scheduler: num_rows and prefill_chunk must be >= 1, got {num_rows} and {prefill_chunk}"
            )
        self._pool = pool
        self._memory = memory
        self._prefill_chunk = prefill_chunk
        self._waiting = deque(jobs)
        self._running: list[Job] = []
        self._free_rows = list(range(num_rows))  # a heap: the lowest is taken first
        for job in self._waiting:
            num_pages = memory.num_pages_of(job.most_tokens)
            if num_pages > pool.num_pages:
                raise ValueError(
                    f"generate: the cache must have {num_pages} pages for the {job.most_tokens} tokens of "
                    f"request {job.request_idx}, got {pool.num_pages}"
                )

    @property
    def num_running(self) -> int:
        """How many jobs have a row."""
        return len(self._running)

    @property
    def is_done(self) -> bool:
        """Whether no job is left."""
        return not (self._running or self._waiting)

    def admit(self) -> None:
        """Give rows to those that wait, as long as each job that still grows has a free page left."""
        while self._waiting and self._free_rows:
            job = self._waiting[0]
            count = self._memory.num_pages_of(job.num_tokens)
            num_growing = sum(self._memory.num_pages_of(r.most_tokens) > len(r.pages) for r in self._running)
            if self._pool.num_free < count + num_growing:
                return
            job.row = heapq.heappop(self._free_rows)
            job.pages = self._pool.take(count)
            self._memory.assign(job.row, job.pages)
            self._running.append(self._waiting.popleft())

    def compact(self, num_rows: int) -> None:
        """Move jobs, as few as will do, so that all that run are in the first `num_rows` rows."""
        for job in self._running:
            if job.row < num_rows:
                continue
            source, job.row = job.row, heapq.heappop(self._free_rows)
            self._memory.move(source, job.row, num_tokens=job.num_cached)
            self._memory.clear(source)
            heapq.heappush(self._free_rows, source)

    def next_chunk(self) -> list[tuple[Job, int]]:
        """Jobs whose prompts are computed next, in one forward, and how many tokens of each.

        The oldest one and those after it that lie in the next rows and start, or go on, as it does, while
        the forward, padding included, has at most `prefill_chunk` tokens.
        """
        chunk: list[tuple[Job, int]] = []
        longest = 0
        for job in self._running:
            length = min(job.num_to_prefill, self._prefill_chunk)
            if length == 0:
                continue
            longest = max(longest, length)
            if chunk and not self._goes_with(job, chunk[-1][0], num_tokens=longest * (len(chunk) + 1)):
                break
            chunk.append((job, length))
        return chunk

    def next_step(self) -> list[Job]:
        """The jobs that decode next, oldest first, each with room for its last token."""
        decoding = [job for job in self._running if job.num_to_prefill == 0]
        for job in decoding:
            if job.row != NO_ROW and self._memory.num_pages_of(job.num_tokens) > len(job.pages):
                self._extend(job)
        return [job for job in decoding if job.row != NO_ROW]

    def finish(self, job: Job) -> None:
        """The job has ended: its row and its pages are free."""
        self._running.remove(job)
        self._release(job)

    def _goes_with(self, job: Job, last: Job, *, num_tokens: int) -> bool:
        is_alike = (job.num_cached == 0) == (last.num_cached == 0)
        return is_alike and job.row == last.row + 1 and num_tokens <= self._prefill_chunk

    def _extend(self, job: Job) -> None:
        """One more page for `job`; the jobs younger than it, or it itself, make room."""
        while self._pool.num_free == 0:
            youngest = self._running.pop()
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is job:
                return
        job.pages += self._pool.take(1)
        self._memory.assign(job.row, job.pages)

    def _release(self, job: Job) -> None:
        self._memory.clear(job.row)
        self._pool.give_back(job.pages)
        heapq.heappush(self._free_rows, job.row)
        job.row, job.pages, job.num_cached = NO_ROW, [], 0
