"""The scheduler as pure code, in whole runs over a cache that remembers what was written where."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.infer.pages import PagePool
from dscoder.infer.scheduler import NO_ROW, Job, Scheduler

MANY = 5000  # iterations that no run here comes near


@dataclass
class Memory:
    """Pages of `page_size` entries, the rows' page tables, and each row's length; 0: rows need no pages."""

    page_size: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    entries: dict[tuple[int, int], object] = field(default_factory=dict)
    num_moves: int = 0

    def num_pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size) if self.page_size else 0

    def assign(self, row: int, pages: list[int]) -> None:
        before = self.tables.get(row, [])
        assert list(pages[: len(before)]) == before  # what the row holds stays where it is
        self.tables[row] = list(pages)
        self.lengths.setdefault(row, 0)

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        assert target not in self.tables
        assert self.lengths[source] == num_tokens
        self.tables[target], self.lengths[target] = self.tables[source], num_tokens
        if not self.page_size:
            held = {place: entry for place, entry in self.entries.items() if place[0] == source}
            self.entries |= {(target, offset): entry for (_, offset), entry in held.items()}
        self.num_moves += 1

    def clear(self, row: int) -> None:
        del self.tables[row], self.lengths[row]

    def place(self, row: int, position: int) -> tuple[int, int]:
        if not self.page_size:
            return row, position
        return self.tables[row][position // self.page_size], position % self.page_size

    def append(self, job: Job, count: int) -> None:
        """What a forward does."""
        assert self.lengths[job.row] == job.num_cached
        for position in range(job.num_cached, job.num_cached + count):
            self.entries[self.place(job.row, position)] = (job.request_idx, position)
        self.lengths[job.row] += count

    def check(self, job: Job) -> None:
        for position in range(job.num_cached):
            assert self.entries[self.place(job.row, position)] == (job.request_idx, position)


@dataclass
class Run:
    """A whole run: requests of (prompt tokens, limit, tokens they really write), and what happened."""

    requests: list[tuple[int, int, int]]
    num_pages: int
    page_size: int
    num_rows: int
    prefill_chunk: int
    is_rounded: bool = False  # batches of 1, 2, 4 ... rows
    chunks: list[list[tuple[int, int, int]]] = field(default_factory=list)  # (request, start, length)
    steps: list[list[int]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)  # each once
    put_back: list[int] = field(default_factory=list)

    def start(self) -> Scheduler:
        self.memory, self.pool = Memory(self.page_size), PagePool(self.num_pages)
        self.jobs = [
            Job(request_idx=i, num_tokens=prompt, most_tokens=prompt + limit - 1)
            for i, (prompt, limit, _) in enumerate(self.requests)
        ]
        return Scheduler(
            self.jobs,
            pool=self.pool,
            memory=self.memory,
            num_rows=self.num_rows,
            prefill_chunk=self.prefill_chunk,
        )

    def go(self) -> "Run":
        scheduler = self.start()
        for _ in range(MANY):
            if scheduler.is_done:
                break
            self.iterate(scheduler)
            self.check(scheduler)
        assert scheduler.is_done
        assert self.pool.num_free == self.num_pages
        assert self.memory.tables == {}
        assert sorted(self.ended) == list(range(len(self.requests)))
        return self

    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.row != NO_ROW]

    def iterate(self, scheduler: Scheduler) -> None:
        scheduler.admit()
        self.admitted += [j.request_idx for j in self.running() if j.request_idx not in self.admitted]
        chunk = scheduler.next_chunk()
        self.check_chunk(chunk)
        for job, length in chunk:
            self.memory.append(job, length)
            job.num_cached += length
        before = self.running()
        jobs = scheduler.next_step()
        self.put_back += [job.request_idx for job in before if job.row == NO_ROW]
        assert before[0].row != NO_ROW  # the oldest goes on
        count = scheduler.num_running
        bound = min(1 << (count - 1).bit_length(), self.num_rows) if self.is_rounded else count
        scheduler.compact(bound)
        assert all(job.row < bound for job in self.running())
        self.steps.append([job.request_idx for job in jobs])
        for job in jobs:
            self.memory.append(job, 1)
            job.num_cached += 1
            job.num_tokens += 1
            prompt, _, written = self.requests[job.request_idx]
            if job.num_tokens == prompt + written:
                scheduler.finish(job)
                self.ended.append(job.request_idx)
        assert chunk or jobs  # something is done in every iteration

    def check_chunk(self, chunk: list[tuple[Job, int]]) -> None:
        self.chunks.append([(job.request_idx, job.num_cached, length) for job, length in chunk])
        if chunk:
            assert len({job.num_cached == 0 for job, _ in chunk}) == 1
            assert len(chunk) * max(length for _, length in chunk) <= self.prefill_chunk
            assert all(b.row == a.row + 1 for (a, _), (b, _) in pairwise(chunk))

    def check(self, scheduler: Scheduler) -> None:
        running = self.running()
        waiting = [j for j in self.jobs if j.row == NO_ROW and j.request_idx not in self.ended]
        assert len(running) == scheduler.num_running <= self.num_rows
        assert len({job.row for job in running}) == len(running)
        # Whoever runs came before all that wait.
        if running and waiting:
            assert max(j.request_idx for j in running) < min(j.request_idx for j in waiting)
        pages = [page for job in running for page in job.pages]
        assert len(set(pages)) == len(pages) == self.num_pages - self.pool.num_free
        for job in running:
            self.memory.check(job)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    requests = []
    for _ in range(draw(st.integers(1, 9))):
        limit = draw(st.integers(1, 12))
        requests.append((draw(st.integers(1, 14)), limit, draw(st.integers(1, limit))))
    page_size = draw(st.integers(0, 5))
    most = max(prompt + limit - 1 for prompt, limit, _ in requests)
    fewest = -(-most // page_size) if page_size else 0
    return Run(
        requests=requests,
        num_pages=fewest + draw(st.integers(0, 12)) if page_size else 0,
        page_size=page_size,
        num_rows=draw(st.integers(1, 6)),
        prefill_chunk=draw(st.integers(1, 9)),
        is_rounded=draw(st.booleans()),
    )


@given(runs())
def test_no_page_is_shared_no_request_is_lost_and_all_of_them_end(run: Run) -> None:
    run.go()


@given(runs())
def test_the_chunks_of_a_request_depend_on_the_request_alone(run: Run) -> None:
    run.go()
    for request_idx, (prompt, _, _) in enumerate(run.requests):
        if request_idx in run.put_back:
            continue
        found = [(start, n) for chunk in run.chunks for i, start, n in chunk if i == request_idx]
        starts = range(0, prompt - 1, run.prefill_chunk)
        assert found == [(start, min(run.prefill_chunk, prompt - 1 - start)) for start in starts]


@given(runs())
def test_requests_get_rows_in_the_order_they_came_and_steps_keep_it(run: Run) -> None:
    run.go()
    assert run.admitted == list(range(len(run.requests)))
    assert all(jobs == sorted(jobs) for jobs in run.steps)


@given(runs())
def test_with_pages_for_all_nobody_is_put_back(run: Run) -> None:
    run.num_pages = sum(-(-(p + n - 1) // run.page_size) for p, n, _ in run.requests) if run.page_size else 0
    assert run.go().put_back == []


def test_the_youngest_makes_room_and_is_computed_again() -> None:
    run = Run(requests=[(2, 6, 6), (2, 6, 6)], num_pages=4, page_size=2, num_rows=2, prefill_chunk=8).go()
    # Both write until the pages are used up; then the older one goes on alone and ends first.
    assert run.put_back == [1]
    assert run.ended == [0, 1]
    again = [entry for chunk in run.chunks for entry in chunk if entry[0] == 1]
    assert again == [(1, 0, 1), (1, 0, 4)]


def test_a_decode_step_runs_beside_every_chunk() -> None:
    run = Run(requests=[(1, 6, 6), (9, 1, 1)], num_pages=9, page_size=4, num_rows=2, prefill_chunk=2).go()
    assert [len(chunk) for chunk in run.chunks[:4]] == [1] * 4
    assert run.steps == [[0], [0], [0], [0, 1], [0], [0]]


def test_a_freed_row_is_taken_in_the_next_iteration() -> None:
    run = Run(
        requests=[(1, 1, 1), (1, 3, 3), (1, 2, 2)], num_pages=9, page_size=4, num_rows=2, prefill_chunk=2
    ).go()
    assert run.steps == [[0, 1], [1, 2], [1, 2]]


def test_rows_move_only_when_the_batch_gets_smaller() -> None:
    requests = [(1, 1, 1), (1, 9, 9), (1, 1, 1), (1, 9, 9)]
    sizes = {"num_pages": 20, "page_size": 4, "num_rows": 4, "prefill_chunk": 2}
    run = Run(requests=requests, is_rounded=True, **sizes).go()
    assert run.memory.num_moves == 1  # of four rows two are left, one of them beyond the second


@pytest.mark.parametrize(("num_rows", "prefill_chunk"), [(0, 4), (4, 0)])
def test_sizes_are_checked(num_rows: int, prefill_chunk: int) -> None:
    with pytest.raises(ValueError, match=f"must be >= 1, got {num_rows} and {prefill_chunk}"):
        Run(
            requests=[(1, 1, 1)], num_pages=1, page_size=1, num_rows=num_rows, prefill_chunk=prefill_chunk
        ).start()


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 4 pages for the 13 tokens of request 1, got 3"):
        Run(requests=[(1, 1, 1), (4, 10, 1)], num_pages=3, page_size=4, num_rows=2, prefill_chunk=2).start()
