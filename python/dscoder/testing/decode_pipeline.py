"""A model of latent decoding on sm_90a: copies, products, weights and barriers of a block, in any order.

It follows the roles of csrc/attention/mla_decode_sm90.cuh: a thread that loads, and two warpgroups of four
warps each that take the blocks of the cache in turn. What a product reads counts as read until its warp has
waited for it; whatever is written there meanwhile is a mistake. Warps are coroutines that yield at every wait
and at everything another role can see; a seed decides who goes on (dscoder.testing.pipeline). `Design` can
plant mistakes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dscoder.testing.pipeline import BrokenError, Mbarrier, NamedBarrier, Role, Waits, play

WARPGROUPS, WARPS = 2, 4
STRIPS, ROPE, HALF = 9, 8, 4  # strips of a block, the rotated key's, those of half the values


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Blocks of a sequence that a part owns; `is_ragged`: rows of the last one are behind its end."""

    num_blocks: int
    is_ragged: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernel is, and what a planted mistake makes of it."""

    num_buffers: int = 2
    scores_first: bool = False
    load_phase: int = 1  # of the loader's first waits on `empty`
    waits_for_halves: tuple[bool, bool] = (True, True)  # the owner's, the other one's
    waits_for_queries: bool = True
    finishes_before_release: bool = True
    releases_last: bool = True  # the block behind a warpgroup's last one
    releases_queries_unused: bool = True  # where a piece has no block of a warpgroup's own
    meets_before_weights: bool = True
    tells_behind_weights: bool = True
    follows_told: bool = True
    blanks: bool = True
    meets_after_blanking: bool = True
    meets_for_sums: bool = True
    num_sum_slots: int = 2


@dataclass(slots=True)
class Strip:
    """64 lines of shared memory: what lies there, and how many products may still read it."""

    full: Mbarrier = field(default_factory=lambda: Mbarrier(count=1))
    holds: object = None
    readers: int = 0
    written_by: set[tuple[int, int]] = field(default_factory=set)  # warps, since the last copy

    def overwrite(self) -> None:
        """By a copy, or by a warp."""
        if self.readers:
            raise BrokenError("a strip is overwritten while it may be read")


class Meeting(NamedBarrier):
    """A named barrier that knows who came."""

    def __init__(self, num_warps: int) -> None:
        super().__init__(num_warps=num_warps)
        self.present: set[tuple[int, int]] = set()

    def come(self, who: tuple[int, int]) -> Waits:
        """What bar.sync waits for; bar.arrive does not."""
        if who in self.present:
            raise BrokenError(f"warp {who} comes to a barrier twice")
        self.present.add(who)
        waits = self.arrive()
        if self.arrived == 0:
            self.present.clear()
        return waits


@dataclass(slots=True)
class Warp:
    """A warp's batches of products in flight, each with the strips that it may still read."""

    group: int
    idx: int
    batches: list[list[Strip]] = field(default_factory=list)
    open_batch: list[Strip] = field(default_factory=list)

    @property
    def who(self) -> tuple[int, int]:
        """Its place among all warps."""
        return self.group, self.idx

    def read(self, strip: Strip) -> None:
        """A product on the strip is issued."""
        strip.readers += 1
        self.open_batch.append(strip)

    def commit(self) -> None:
        """wgmma.commit_group."""
        self.batches.append(self.open_batch)
        self.open_batch = []

    def finish(self, num_behind: int) -> None:
        """wgmma.wait_group."""
        while len(self.batches) > num_behind:
            for strip in self.batches.pop(0):
                strip.readers -= 1


class Block:
    """A block of the grid and the roles in it."""

    def __init__(self, design: Design, pieces: Sequence[Piece], seed: int) -> None:
        self.design, self.pieces, self.random = design, pieces, random.Random(seed)
        self.flying: list[Callable[[], None]] = []
        self.queries = [Strip() for _ in range(STRIPS)]
        self.queries_full, self.queries_empty = Mbarrier(count=1), Mbarrier(count=WARPGROUPS * WARPS)
        self.buffers = [[Strip() for _ in range(STRIPS)] for _ in range(2)]
        self.empty = [[Mbarrier(count=WARPS) for _ in range(WARPGROUPS)] for _ in range(2)]
        self.told = [Meeting(WARPGROUPS * WARPS) for _ in range(WARPGROUPS)]
        self.scored = [Meeting(WARPS) for _ in range(WARPGROUPS)]
        self.blanked = [Meeting(WARPS) for _ in range(WARPGROUPS)]
        self.summed = Meeting(WARPGROUPS * WARPS)
        self.maxima: list[list[int]] = [[-1] * WARPS for _ in range(WARPGROUPS)]
        self.sums: dict[tuple[int, int, int], int] = {}
        self.num_scored = self.num_multiplied = 0

    def place(self, n: int) -> tuple[int, int]:
        """Buffer and parity of the part's n-th block."""
        return n % self.design.num_buffers, n // self.design.num_buffers % 2

    def roles(self) -> list[Role]:
        """The thread that loads, and all warps that multiply."""
        warps = [Warp(group, idx) for group in range(WARPGROUPS) for idx in range(WARPS)]
        return [self.load_pieces(), *(self.attend_pieces(warp) for warp in warps)]

    # ---- copies ----

    def load_pieces(self) -> Role:
        """load_pieces of mla_decode_sm90.cuh."""
        n = num_loaded = 0
        for idx, piece in enumerate(self.pieces):
            if piece.num_blocks == 0:
                continue
            if self.design.waits_for_queries:
                yield partial(self.queries_empty.is_over, num_loaded % 2 ^ self.design.load_phase)
            self.queries_full.arrive(STRIPS)
            for strip in self.queries:
                self.copy(strip, self.queries_full, idx)
            num_loaded += 1
            for _ in range(piece.num_blocks):
                yield from self.load_block(n)
                n += 1

    def load_block(self, n: int) -> Role:
        """Strips by the turns in which they are free."""
        buffer, phase = self.place(n)
        owner = n % WARPGROUPS
        for turn in range(STRIPS):
            for wait, (first_turn, group) in zip(
                self.design.waits_for_halves, ((0, owner), (HALF, 1 - owner)), strict=True
            ):
                if turn == first_turn and wait:
                    yield partial(self.empty[buffer][group].is_over, phase ^ self.design.load_phase)
            strip = self.buffers[buffer][strip_in_turn(owner, turn)]
            strip.full.arrive(1)
            self.copy(strip, strip.full, n)
            yield lambda: True

    def copy(self, strip: Strip, full: Mbarrier, what: int) -> None:
        """Lands at any time from here on."""

        def land() -> None:
            strip.overwrite()
            strip.holds = what
            strip.written_by.clear()
            full.complete(1)

        self.flying.append(land)

    # ---- products ----

    def attend_pieces(self, warp: Warp) -> Role:
        """attend_pieces of mla_decode_sm90.cuh."""
        n = num_attended = 0
        for idx, piece in enumerate(self.pieces):
            if piece.num_blocks == 0:
                continue
            end = n + piece.num_blocks
            ragged = end - 1 if piece.is_ragged else -1
            yield from self.attend(warp, idx, (n, end, ragged), num_attended % 2)
            yield from self.add_sums(warp, idx, num_attended % self.design.num_sum_slots)
            n = end
            num_attended += 1

    def attend(self, warp: Warp, piece: int, blocks: tuple[int, int, int], parity: int) -> Role:
        """Blocks n to end of a piece."""
        first, end, ragged = blocks
        first_own = first + (first + warp.group) % 2
        if first_own < end:
            yield partial(self.queries_full.is_over, parity)
        elif self.design.releases_queries_unused:
            self.queries_empty.arrive()
        for n in range(first_own, end, WARPGROUPS):
            yield from self.take_block(warp, piece, n, ragged, n > first, n + WARPGROUPS >= end)
        if (end - 1) % WARPGROUPS != warp.group:
            yield from self.multiply_kept(warp, end - 1, ragged, self.design.releases_last)

    def take_block(
        self, warp: Warp, piece: int, n: int, ragged: int, has_previous: bool, is_last: bool
    ) -> Role:
        """take_block of mla_decode_sm90.cuh, in the order of the design."""
        buffer = self.buffers[self.place(n)[0]]
        if self.design.scores_first:
            yield from self.issue_scores(warp, piece, n)
            if has_previous:
                yield from self.issue_kept(warp, n - 1, ragged)
                warp.commit()
            yield from self.finish(warp, int(has_previous))  # the scores
        else:
            if has_previous:
                yield from self.multiply_kept(warp, n - 1, ragged, True)
            yield from self.issue_scores(warp, piece, n)
            yield from self.finish(warp, 0)
        if is_last:
            self.queries_empty.arrive()
        yield from self.weigh_and_tell(warp, n, buffer)
        if self.design.scores_first:
            yield from self.finish(warp, 0)
            if has_previous:
                self.release(warp, n - 1)
        yield from self.blank_values(warp, n, ragged)
        self.issue_values(warp, n, ragged)
        warp.commit()
        if not self.design.finishes_before_release:
            self.release(warp, n)
        yield from self.finish(warp, 0)
        if self.design.finishes_before_release:
            self.release(warp, n)

    def issue_scores(self, warp: Warp, piece: int, n: int) -> Role:
        """Strip by strip, as they come."""
        buffer, phase = self.place(n)
        for turn in range(STRIPS):
            idx = strip_in_turn(warp.group, turn)
            strip = self.buffers[buffer][idx]
            yield partial(strip.full.is_over, phase)
            if (strip.holds, self.queries[idx].holds) != (n, piece) or strip.written_by:
                raise BrokenError(f"scores of block {n} read {strip}")
            warp.read(strip)
            warp.read(self.queries[idx])
        warp.commit()
        self.num_scored += 1

    def weigh_and_tell(self, warp: Warp, n: int, buffer: list[Strip]) -> Role:
        """Maxima and weights for the other warpgroup."""
        self.maxima[warp.group][warp.idx] = n
        if self.design.meets_before_weights:
            yield self.scored[warp.group].come(warp.who)
        if not self.design.tells_behind_weights:
            self.told[warp.group].come(warp.who)
            yield lambda: True
        buffer[ROPE].overwrite()
        buffer[ROPE].written_by.add(warp.who)
        yield lambda: True
        if self.design.tells_behind_weights:
            self.told[warp.group].come(warp.who)

    def issue_kept(self, warp: Warp, n: int, ragged: int) -> Role:
        """The product on the other warpgroup's weights."""
        buffer, phase = self.place(n)
        other = 1 - warp.group
        for strip in self.own_half(warp, n):
            yield partial(strip.full.is_over, phase)
        met = self.told[other].come(warp.who)
        if self.design.follows_told:
            yield met
        if self.maxima[other][warp.idx] != n:
            raise BrokenError(f"maxima of block {n} are those of {self.maxima[other][warp.idx]}")
        yield from self.blank_values(warp, n, ragged)
        weights = self.buffers[buffer][ROPE]
        if weights.holds != n or weights.written_by != {(other, idx) for idx in range(WARPS)}:
            raise BrokenError(f"weights of block {n} are {weights}")
        warp.read(weights)
        self.issue_values(warp, n, ragged)

    def multiply_kept(self, warp: Warp, n: int, ragged: int, releases: bool) -> Role:
        """The same, to its end."""
        yield from self.issue_kept(warp, n, ragged)
        warp.commit()
        yield from self.finish(warp, 0)
        if releases:
            self.release(warp, n)

    def own_half(self, warp: Warp, n: int) -> list[Strip]:
        """Of the values in a block's buffer."""
        return self.buffers[self.place(n)[0]][warp.group * HALF : (warp.group + 1) * HALF]

    def blank_values(self, warp: Warp, n: int, ragged: int) -> Role:
        """This warp's part of the zeros, then the warpgroup meets."""
        if n != ragged or not self.design.blanks:
            return
        yield lambda: True
        for strip in self.own_half(warp, n):
            strip.overwrite()
            strip.written_by.add(warp.who)
        if self.design.meets_after_blanking:
            yield self.blanked[warp.group].come(warp.who)

    def issue_values(self, warp: Warp, n: int, ragged: int) -> None:
        """The half of the values must be the block's, without rows behind the sequence."""
        wanted = {(warp.group, idx) for idx in range(WARPS)} if n == ragged else set()
        for strip in self.own_half(warp, n):
            if strip.holds != n or strip.written_by != wanted:
                raise BrokenError(f"values of block {n} are {strip}")
            warp.read(strip)
        self.num_multiplied += 1

    def finish(self, warp: Warp, num_behind: int) -> Role:
        """The wait for all but so many batches."""
        yield lambda: True
        warp.finish(num_behind)

    def release(self, warp: Warp, n: int) -> None:
        """This warp's half of a block."""
        self.empty[self.place(n)[0]][warp.group].arrive()

    def add_sums(self, warp: Warp, piece: int, slot: int) -> Role:
        """Each warp's sums to the other warpgroup's warp of the same rows."""
        self.sums[slot, warp.group, warp.idx] = piece
        yield lambda: True
        if self.design.meets_for_sums:
            yield self.summed.come(warp.who)
        if self.sums.get((slot, 1 - warp.group, warp.idx)) != piece:
            raise BrokenError(f"sums of piece {piece} are another's")

    # ---- the end ----

    def check_end(self) -> None:
        """Every product was made, nothing is in flight, and barriers stand where they began."""
        num_blocks = sum(piece.num_blocks for piece in self.pieces)
        if (self.num_scored, self.num_multiplied) != (WARPS * num_blocks, WARPGROUPS * WARPS * num_blocks):
            raise BrokenError("a product is missing")
        if self.queries_full.phase != self.queries_empty.phase:
            raise BrokenError("queries were not released as often as they came")
        for buffer, halves in zip(self.buffers, self.empty, strict=True):
            phases = {strip.full.phase for strip in buffer} | {half.phase for half in halves}
            if len(phases) > 1 or any(strip.readers for strip in buffer):
                raise BrokenError(f"a buffer ends as {buffer}, {halves}")


def strip_in_turn(owner: int, turn: int) -> int:
    """strip_in_turn of mla_decode_blocks_sm90.cuh."""
    return ROPE if turn == ROPE else (turn + owner * HALF) % ROPE


def explore(design: Design, pieces: Sequence[Piece], seed: int) -> None:
    """A part's pieces under one order of events."""
    block = Block(design, pieces, seed)
    play(block.roles(), block.flying, block.random)
    block.check_end()
