"""A model of prefill attention's gradients on sm_90a: copies, products and barriers of a block, in any order.

It follows the roles of csrc/attention/mla_prefill_backward_sm90.cuh over the one tile of keys that a block
takes: a thread that loads, one that adds sums of dQ, and two warpgroups of four warps that go through the
blocks of queries. What a product reads counts as read until its warp has waited for it; whatever is written
there meanwhile is a mistake. Warps are coroutines that yield at every wait and at everything another role can
see; a seed decides who goes on (dscoder.testing.pipeline). `Design` can plant mistakes.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from dscoder.testing.pipeline import BrokenError, Mbarrier, NamedBarrier, Role, play

WARPGROUPS, WARPS = 2, 4
ALL_WARPS = WARPGROUPS * WARPS
Who = tuple[int, int]  # a warpgroup and its warp
EVERYBODY = {(group, idx) for group in range(WARPGROUPS) for idx in range(WARPS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """Blocks of queries of each head; `is_ragged`: rows of a head's last one are behind the sequence."""

    num_heads: int = 1
    num_blocks: int = 1
    is_ragged: bool = False
    has_ragged_keys: bool = False

    @property
    def length(self) -> int:
        """Of all heads."""
        return self.num_heads * self.num_blocks

    def blanks(self, n: int) -> bool:
        """Whether block n has rows behind the sequence."""
        return self.is_ragged and n % self.num_blocks == self.num_blocks - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernel is, and what a planted mistake makes of it."""

    num_stages: int = 2
    load_phase: int = 1  # of the loader's first waits on `empty`
    waits_for_queries: bool = True
    waits_for_weights: bool = True  # that nobody reads a block's P and dS any more
    meets_own: bool = True  # behind a warpgroup's P
    meets_all: bool = True  # behind dS of both
    finishes: bool = True  # all products before queries, dO, P and dS are released
    waits_for_sums: bool = True  # that the block before's are read
    sums_count: int = ALL_WARPS  # warps that tell of a block's sums
    reads_before_release: bool = True  # what the copy engine adds
    blanks: bool = True
    blanks_full: bool = True
    meets_after_blanking: bool = True
    meets_over: bool = True  # ahead of dK and dV in the places of K and V


@dataclass(slots=True)
class Area:
    """Shared memory: what lies there, who wrote it since the last copy, and how many products may read it."""

    holds: object = None
    readers: int = 0
    written_by: set[Who] = field(default_factory=set)

    def overwrite(self) -> None:
        """By a copy, or by a warp."""
        if self.readers:
            raise BrokenError(f"{self.holds} is overwritten while it may be read")

    def keep(self, what: object, who: Who) -> None:
        """A warp's part of `what`."""
        self.overwrite()
        if self.holds != what:
            self.holds = what
            self.written_by.clear()
        self.written_by.add(who)


@dataclass(slots=True)
class Stage:
    """An area that the copy engine fills, and its barriers."""

    full: Mbarrier = field(default_factory=lambda: Mbarrier(count=1))
    empty: Mbarrier = field(default_factory=lambda: Mbarrier(count=ALL_WARPS))
    area: Area = field(default_factory=Area)


@dataclass(slots=True)
class Warp:
    """A warp's batches of products in flight, each with the areas that it may still read."""

    group: int
    idx: int
    batches: list[list[Area]] = field(default_factory=list)

    @property
    def who(self) -> Who:
        """Its place among all warps."""
        return self.group, self.idx

    def issue(self, *areas: Area) -> None:
        """A batch of products."""
        for area in areas:
            area.readers += 1
        self.batches.append(list(areas))

    def finish(self, num_behind: int) -> None:
        """wgmma.wait_group."""
        while len(self.batches) > num_behind:
            for area in self.batches.pop(0):
                area.readers -= 1


class Block:
    """A block of the grid and the roles in it."""

    def __init__(self, design: Design, walk: Walk, seed: int) -> None:
        self.design, self.walk, self.random = design, walk, random.Random(seed)
        self.flying: list[Callable[[], None]] = []
        self.keys, self.values = Stage(), Stage()
        self.queries = [Stage() for _ in range(design.num_stages)]
        self.grad_out = [Stage() for _ in range(design.num_stages)]
        self.weights = [Area() for _ in range(WARPGROUPS)]  # P of a warpgroup's keys
        self.grad_scores, self.sums = Area(), Area()
        self.weights_empty = Mbarrier(count=ALL_WARPS)
        self.sums_full, self.sums_empty = Mbarrier(count=design.sums_count), Mbarrier(count=1)
        self.blanked, self.shared, self.over = (NamedBarrier(num_warps=ALL_WARPS) for _ in range(3))
        self.weighed = [NamedBarrier(num_warps=WARPS) for _ in range(WARPGROUPS)]
        self.num_issued = 0
        self.added: list[int] = []
        self.stored: set[Who] = set()

    def place(self, n: int) -> tuple[int, int]:
        """Stage and parity of the n-th block."""
        return n % self.design.num_stages, n // self.design.num_stages % 2

    def roles(self) -> list[Role]:
        """The threads that load and add, and all warps that multiply."""
        warps = [Warp(group, idx) for group in range(WARPGROUPS) for idx in range(WARPS)]
        return [self.load_tile(), self.add_tile(), *(self.take_tile(warp) for warp in warps)]

    # ---- copies ----

    def load_tile(self) -> Role:
        """load_tile of mla_prefill_backward_sm90.cuh."""
        if self.walk.length:
            yield from self.copy(self.keys, "keys")
        for n in range(self.walk.length):
            stage, phase = self.place(n)
            if self.design.waits_for_queries:
                yield partial(self.queries[stage].empty.is_over, phase ^ self.design.load_phase)
            yield from self.copy(self.queries[stage], n)
            if n == 0:
                yield from self.copy(self.values, "values")
            yield from self.copy(self.grad_out[stage], n)

    def copy(self, target: Stage, what: object) -> Role:
        """Lands at any time from here on."""
        target.full.arrive(1)

        def land() -> None:
            target.area.overwrite()
            target.area.holds = what
            target.area.written_by.clear()
            target.full.complete(1)

        self.flying.append(land)
        yield lambda: True

    def add_tile(self) -> Role:
        """add_tile of mla_prefill_backward_sm90.cuh: the copy engine reads the sums some time behind."""
        for n in range(self.walk.length):
            yield partial(self.sums_full.is_over, n % 2)
            self.sums.readers += 1

            def read(n: int = n) -> None:
                if self.sums.holds != n or self.sums.written_by != EVERYBODY:
                    raise BrokenError(f"sums of block {n} are {self.sums}")
                self.sums.readers -= 1
                self.added.append(n)

            self.flying.append(read)
            if self.design.reads_before_release:
                yield partial(self.has_added, n)
            self.sums_empty.arrive()

    def has_added(self, n: int) -> bool:
        """cp.async.bulk.wait_group.read."""
        return n in self.added

    # ---- products ----

    def take_tile(self, warp: Warp) -> Role:
        """take_tile of mla_prefill_backward_products_sm90.cuh."""
        if self.walk.length:
            yield from self.take_blocks(warp)
        if self.design.meets_over:
            yield self.over.arrive()
        for stage in (self.keys, self.values):
            stage.area.overwrite()
        yield self.weighed[warp.group].arrive()
        self.stored.add(warp.who)

    def take_blocks(self, warp: Warp) -> Role:
        """All of the walk."""
        if self.walk.has_ragged_keys:
            yield from self.blank(warp, self.keys, self.values, 0)
        for stage in (self.keys, self.values):
            yield partial(stage.full.is_over, 0)
        for n in range(self.walk.length):
            place, phase = self.place(n)
            if self.walk.blanks(n):
                yield from self.blank(warp, self.queries[place], self.grad_out[place], phase)
            yield from self.make_scores(warp, n)
            yield from self.multiply_scores(warp, n)

    def blank(self, warp: Warp, first: Stage, second: Stage, phase: int) -> Role:
        """This warp's part of the zeros in its warpgroup's operand, then both warpgroups meet."""
        if not self.design.blanks:
            return
        if self.design.blanks_full:
            for stage in (first, second):
                yield partial(stage.full.is_over, phase)
        yield lambda: True
        own = second if warp.group else first
        own.area.overwrite()
        own.area.written_by.add(warp.who)
        if self.design.meets_after_blanking:
            yield self.blanked.arrive()

    def read(self, stage: Stage, what: object, group: int, is_blanked: bool) -> Area:
        """An operand of a product, which the warpgroup `group` has blanked."""
        wanted = {(group, idx) for idx in range(WARPS)} if is_blanked else set()
        if stage.area.holds != what or stage.area.written_by != wanted:
            raise BrokenError(f"a product with {what} reads {stage.area}")
        self.num_issued += 1
        return stage.area

    def operands(self, n: int) -> tuple[Area, Area, Area, Area]:
        """Q, dO, K and V."""
        place, _ = self.place(n)
        of_queries, of_keys = self.walk.blanks(n), self.walk.has_ragged_keys
        return (
            self.read(self.queries[place], n, 0, of_queries),
            self.read(self.grad_out[place], n, 1, of_queries),
            self.read(self.keys, "keys", 0, of_keys),
            self.read(self.values, "values", 1, of_keys),
        )

    def make_scores(self, warp: Warp, n: int) -> Role:
        """make_scores of mla_prefill_backward_products_sm90.cuh."""
        place, phase = self.place(n)
        for stage in (self.queries[place], self.grad_out[place]):
            yield partial(stage.full.is_over, phase)
        queries, grad_out, keys, values = self.operands(n)
        warp.issue(queries, keys)
        warp.issue(grad_out, values)
        yield lambda: True
        warp.finish(1)
        if self.design.waits_for_weights:
            yield partial(self.weights_empty.is_over, n % 2 ^ 1)
        weights = self.weights[warp.group]
        weights.keep(n, warp.who)
        if self.design.meets_own:
            yield self.weighed[warp.group].arrive()
        if weights.holds != n or weights.written_by != {(warp.group, idx) for idx in range(WARPS)}:
            raise BrokenError(f"P of block {n} is {weights}")
        warp.issue(grad_out, weights)
        yield lambda: True
        warp.finish(1)
        self.grad_scores.keep(n, warp.who)
        if self.design.meets_all:
            yield self.shared.arrive()

    def multiply_scores(self, warp: Warp, n: int) -> Role:
        """multiply_scores of mla_prefill_backward_products_sm90.cuh."""
        place, _ = self.place(n)
        queries, _, keys, _ = self.operands(n)
        if self.grad_scores.holds != n or self.grad_scores.written_by != EVERYBODY:
            raise BrokenError(f"dS of block {n} is {self.grad_scores}")
        warp.issue(self.grad_scores, keys)
        warp.issue(queries, self.grad_scores)
        yield lambda: True
        warp.finish(1)
        if self.design.waits_for_sums:
            yield partial(self.sums_empty.is_over, n % 2 ^ 1)
        self.sums.keep(n, warp.who)
        if warp.group * WARPS + warp.idx < self.design.sums_count:
            self.sums_full.arrive()
        if self.design.finishes:
            yield lambda: True
            warp.finish(0)
        self.queries[place].empty.arrive()
        self.weights_empty.arrive()
        yield lambda: True
        warp.finish(0)

    # ---- the end ----

    def check_end(self) -> None:
        """Every product was made and every sum added, nothing is in flight, and barriers are even."""
        if self.num_issued != 8 * ALL_WARPS * self.walk.length or self.stored != EVERYBODY:
            raise BrokenError("a product or a result is missing")
        if self.added != list(range(self.walk.length)):
            raise BrokenError(f"sums were added of blocks {self.added}")
        for queries, grad_out in zip(self.queries, self.grad_out, strict=True):
            phases = {queries.full.phase, grad_out.full.phase, queries.empty.phase}
            if len(phases) > 1 or queries.area.readers or grad_out.area.readers:
                raise BrokenError(f"a stage ends as {queries}, {grad_out}")
        for barrier in (self.blanked, self.shared, self.over, *self.weighed):
            if barrier.arrived:
                raise BrokenError(f"{barrier.arrived} warps are left at a barrier")


def explore(design: Design, walk: Walk, seed: int) -> None:
    """A tile's walk under one order of events."""
    block = Block(design, walk, seed)
    play(block.roles(), block.flying, block.random)
    block.check_end()
