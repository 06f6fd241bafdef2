"""A model of prefill attention on sm_90a: copies, products, turns and barriers of a block, in any order.

It follows the roles of csrc/attention/mla_prefill_sm90.cuh: a thread that finds tiles and loads, and two
warpgroups of four warps each that multiply all blocks of keys of a tile by half of its rows. What a product
reads counts as read until its warp has waited for it; whatever is written there meanwhile is a mistake. Warps
are coroutines that yield at every wait and at everything another role can see; a seed decides who goes on
(dscoder.testing.pipeline). `Design` can plant mistakes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dscoder.testing.pipeline import BrokenError, Mbarrier, NamedBarrier, Role, Waits, play

WARPGROUPS, WARPS = 2, 4
ALL_WARPS = WARPGROUPS * WARPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """Blocks of keys that a tile's rows see; `is_ragged`: rows of the last one are behind the sequence."""

    num_blocks: int
    is_ragged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernel is, and what a planted mistake makes of it."""

    num_stages: int = 2
    takes_turns: bool = True
    load_phase: int = 1  # of the loader's first waits on `empty`
    waits_for_keys: bool = True
    waits_for_values: bool = True
    waits_for_queries: bool = True
    num_slots: int = 2  # where tiles are told of
    finishes_scores: bool = True  # before a block of keys is released
    finishes_values: bool = True
    rounds_late: bool = True  # weights into registers that no product reads any more
    releases_blind: bool = True  # the queries of a tile without blocks
    releases_last: bool = True  # the values of a tile's last block
    gives_last: bool = True  # the turn at the end of a tile
    has_first_turn: bool = True
    blanks: bool = True
    blanks_full: bool = True
    meets_after_blanking: bool = True
    blanks_ahead_of_turn: bool = True


@dataclass(slots=True)
class Area:
    """Shared memory that one barrier tells of: what lies there, and how many products may still read it."""

    full: Mbarrier
    empty: Mbarrier
    holds: object = None
    readers: int = 0
    blanked: set[tuple[int, int]] = field(default_factory=set)  # by which warps, since the last copy


def area() -> Area:
    """With the barriers of init_barriers."""
    return Area(full=Mbarrier(count=1), empty=Mbarrier(count=ALL_WARPS))


@dataclass(slots=True)
class Place:
    """Where in a ring a role stands."""

    num_stages: int
    stage: int = 0
    phase: int = 0

    def advance(self) -> None:
        """To the next stage."""
        self.stage += 1
        if self.stage == self.num_stages:
            self.stage, self.phase = 0, self.phase ^ 1


@dataclass(slots=True)
class Warp:
    """A warp's places, and its batches of products in flight with the areas that each may still read."""

    group: int
    idx: int
    keys: Place
    values: Place
    batches: list[list[Area]] = field(default_factory=list)
    reads_weights: bool = False  # a batch in flight does

    @property
    def who(self) -> tuple[int, int]:
        """Its place among all warps."""
        return self.group, self.idx

    def issue(self, *areas: Area) -> None:
        """A batch of products."""
        for one in areas:
            one.readers += 1
        self.batches.append(list(areas))

    def finish(self, num_behind: int) -> None:
        """wgmma.wait_group."""
        while len(self.batches) > num_behind:
            for one in self.batches.pop(0):
                one.readers -= 1
        if not self.batches:
            self.reads_weights = False


class Block:
    """A block of the grid and the roles in it."""

    def __init__(self, design: Design, tiles: Sequence[Tile], seed: int) -> None:
        self.design, self.tiles, self.random = design, tiles, random.Random(seed)
        self.flying: list[Callable[[], None]] = []
        self.queries = area()
        self.keys = [area() for _ in range(design.num_stages)]
        self.values = [area() for _ in range(design.num_stages)]
        self.told: list[int | None] = [None] * design.num_slots
        self.turns = [NamedBarrier(num_warps=ALL_WARPS) for _ in range(WARPGROUPS)]
        self.blanked = NamedBarrier(num_warps=ALL_WARPS)
        self.num_issued = 0
        self.stored: list[set[tuple[int, int]]] = [set() for _ in tiles]

    def roles(self) -> list[Role]:
        """The thread that loads, and all warps that multiply."""
        num_stages = self.design.num_stages
        warps = [
            Warp(group, idx, Place(num_stages), Place(num_stages))
            for group in range(WARPGROUPS)
            for idx in range(WARPS)
        ]
        return [self.load_tiles(), *(self.attend_tiles(warp) for warp in warps)]

    # ---- copies ----

    def load_tiles(self) -> Role:
        """load_tiles of mla_prefill_sm90.cuh."""
        design = self.design
        keys, values = Place(design.num_stages), Place(design.num_stages)
        for idx, tile in enumerate(self.tiles):
            blocks = range(tile.num_blocks - 1, -1, -1)
            if blocks:
                yield from self.load(self.keys, keys, (idx, blocks[0]), design.waits_for_keys)
            yield from self.load_queries(idx, tile)
            for block in blocks:
                if block > 0:
                    yield from self.load(self.keys, keys, (idx, block - 1), design.waits_for_keys)
                yield from self.load(self.values, values, (idx, block), design.waits_for_values)
        yield from self.load_queries(len(self.tiles), Tile(num_blocks=0))

    def load_queries(self, idx: int, tile: Tile) -> Role:
        """Tells of the tile, or that there is none."""
        if self.design.waits_for_queries:
            yield partial(self.queries.empty.is_over, idx % 2 ^ self.design.load_phase)
        self.told[idx % self.design.num_slots] = idx
        if tile.num_blocks:
            self.queries.full.arrive(1)
            self.copy(self.queries, idx)
        else:
            self.queries.full.arrive()
        yield lambda: True

    def load(self, ring: list[Area], place: Place, what: tuple[int, int], waits: bool) -> Role:
        """A block of keys, or of values."""
        target = ring[place.stage]
        if waits:
            yield partial(target.empty.is_over, place.phase ^ self.design.load_phase)
        target.full.arrive(1)
        self.copy(target, what)
        place.advance()
        yield lambda: True

    def copy(self, target: Area, what: object) -> None:
        """Lands at any time from here on."""

        def land() -> None:
            if target.readers:
                raise BrokenError(f"{target.holds} is overwritten while it may be read")
            target.holds = what
            target.blanked.clear()
            target.full.complete(1)

        self.flying.append(land)

    # ---- products ----

    def attend_tiles(self, warp: Warp) -> Role:
        """attend_tiles of mla_prefill_products_sm90.cuh."""
        turns = self.design.takes_turns
        if turns and warp.group == 1 and self.design.has_first_turn:
            self.turns[0].arrive()
        for idx in range(len(self.tiles) + 1):
            yield partial(self.queries.full.is_over, idx % 2)
            self.check_told(idx)
            if idx == len(self.tiles):
                break
            if self.tiles[idx].num_blocks:
                yield from self.attend(warp, idx)
            elif self.design.releases_blind:
                self.queries.empty.arrive()
            yield lambda: True
            self.check_told(idx)
            self.stored[idx].add(warp.who)
        if turns and warp.group == 0:
            yield self.turns[0].arrive()

    def check_told(self, idx: int) -> None:
        """What a warp reads of its tile."""
        if self.told[idx % self.design.num_slots] != idx:
            raise BrokenError(f"tile {idx} is told of as {self.told}")

    def attend(self, warp: Warp, idx: int) -> Role:
        """A tile's blocks from the last one to the first."""
        design, tile = self.design, self.tiles[idx]
        ragged = tile.num_blocks - 1 if tile.is_ragged else -1
        for block in range(tile.num_blocks - 1, -1, -1):
            is_first = block == tile.num_blocks - 1
            if is_first:
                yield self.keys_are_there(warp)
            yield from self.take_turn(warp)
            self.issue_scores(warp, (idx, block))
            if not is_first:
                yield from self.issue_values(warp, (idx, block + 1), ragged)
            self.give_turn(warp)
            yield from self.release_keys(warp, is_first, is_last=block == 0)
            if not design.rounds_late:
                self.round_weights(warp)
            if not is_first:
                if block > 0:
                    yield self.keys_are_there(warp)
                yield from self.release_values(warp, True)
            if design.rounds_late:
                self.round_weights(warp)
            if is_first and design.blanks_ahead_of_turn:
                yield from self.blank(warp, tile)
            if is_first and block > 0:
                yield self.keys_are_there(warp)
        yield from self.take_turn(warp)
        if not design.blanks_ahead_of_turn:
            yield from self.blank(warp, tile)
        yield from self.issue_values(warp, (idx, 0), ragged)
        if design.gives_last:
            self.give_turn(warp)
        yield from self.release_values(warp, design.releases_last)

    def keys_are_there(self, warp: Warp) -> Waits:
        """The next block's."""
        return partial(self.keys[warp.keys.stage].full.is_over, warp.keys.phase)

    def round_weights(self, warp: Warp) -> None:
        """Into the registers that the next product reads."""
        if warp.reads_weights:
            raise BrokenError("weights are rounded while a product reads those of the block before")

    def take_turn(self, warp: Warp) -> Role:
        """bar.sync on the own barrier."""
        if self.design.takes_turns:
            yield self.turns[warp.group].arrive()

    def give_turn(self, warp: Warp) -> None:
        """bar.arrive on the other warpgroup's."""
        if self.design.takes_turns:
            self.turns[1 - warp.group].arrive()

    def issue_scores(self, warp: Warp, what: tuple[int, int]) -> None:
        """Of the tile's queries and a block of keys."""
        block = self.keys[warp.keys.stage]
        if (self.queries.holds, block.holds) != (what[0], what):
            raise BrokenError(f"scores {what} read {self.queries.holds} and {block.holds}")
        warp.issue(self.queries, block)
        self.num_issued += 1

    def issue_values(self, warp: Warp, what: tuple[int, int], ragged: int) -> Role:
        """Of the block's weights and values, without rows behind the sequence."""
        values = self.values[warp.values.stage]
        yield partial(values.full.is_over, warp.values.phase)
        everybody = {(group, idx) for group in range(WARPGROUPS) for idx in range(WARPS)}
        if values.holds != what or values.blanked != (everybody if what[1] == ragged else set()):
            raise BrokenError(f"the product on values {what} reads {values}")
        warp.issue(values)
        warp.reads_weights = True
        self.num_issued += 1

    def release_keys(self, warp: Warp, is_first: bool, is_last: bool) -> Role:
        """When the scores are over; with the last ones the queries, too."""
        if self.design.finishes_scores:
            yield lambda: True
            warp.finish(0 if is_first else 1)
        self.keys[warp.keys.stage].empty.arrive()
        warp.keys.advance()
        if is_last:
            self.queries.empty.arrive()

    def release_values(self, warp: Warp, releases: bool) -> Role:
        """When the product on them is over."""
        if self.design.finishes_values:
            yield lambda: True
            warp.finish(0)
        if releases:
            self.values[warp.values.stage].empty.arrive()
        warp.values.advance()
        if not self.design.finishes_values:
            yield lambda: True
            warp.finish(0)

    def blank(self, warp: Warp, tile: Tile) -> Role:
        """This warp's part of the zeros, then both warpgroups meet."""
        if not tile.is_ragged or not self.design.blanks:
            return
        values = self.values[warp.values.stage]
        if self.design.blanks_full:
            yield partial(values.full.is_over, warp.values.phase)
        yield lambda: True
        if values.readers:
            raise BrokenError("values are blanked while they may be read")
        values.blanked.add(warp.who)
        if self.design.meets_after_blanking:
            yield self.blanked.arrive()

    # ---- the end ----

    def check_end(self) -> None:
        """Every product was made, all rows are stored, and barriers stand where they began."""
        num_blocks = sum(tile.num_blocks for tile in self.tiles)
        if self.num_issued != 2 * ALL_WARPS * num_blocks:
            raise BrokenError("a product is missing")
        if any(len(warps) != ALL_WARPS for warps in self.stored):
            raise BrokenError(f"tiles were stored by {self.stored}")
        if self.queries.full.phase != self.queries.empty.phase + 1:
            raise BrokenError("queries were not released as often as they came")
        for one in (*self.keys, *self.values):
            if one.full.phase != one.empty.phase or one.readers:
                raise BrokenError(f"a stage ends as {one}")
        for barrier in (*self.turns, self.blanked):
            if barrier.arrived:
                raise BrokenError(f"{barrier.arrived} warps are left at a barrier")


def explore(design: Design, tiles: Sequence[Tile], seed: int) -> None:
    """A block's tiles under one order of events."""
    block = Block(design, tiles, seed)
    play(block.roles(), block.flying, block.random)
    block.check_end()
