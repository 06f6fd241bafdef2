"""A model of the sm_90a pipeline: loads, products and barriers of a cluster, step by step in any order.

No GPU has to be at hand to see a deadlock or a stage overwritten too early. The model follows the roles of
csrc/gemm/grouped_gemm_sm90.cuh, tile_product_sm90.cuh and the blanking of grouped_gemm_wgrad_sm90.cuh: each
block has a loading warp and two warpgroups of four warps, a ring of stages, two barriers a stage with phases
as mbarriers have them, and the named barriers. Each block finds its tiles by itself, from row counts
(dscoder.testing.tile_pairs). Roles are coroutines that yield at every wait and at everything another role can
see; a seed decides who goes on. `Design` can plant mistakes.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from dscoder.testing.tile_pairs import DEPTH_BLOCK, Job, ProductTile

CLUSTER, WARPGROUPS, WARPS = 2, 2, 4
BYTES_A, BYTES_B = 2, 4  # of a stage, in units of half an operand
SLOWNESS = 0.95  # how often the slow one of all roles lets another go on

Waits = Callable[[], bool]
Role = Iterator[Waits]


class BrokenError(AssertionError):
    """The pipeline did what it must not."""


def is_seen(explore: Callable[[int], None], *, num_seeds: int) -> bool:
    """Whether some order of events, of those that the first seeds draw, shows a mistake."""
    for seed in range(num_seeds):
        try:
            explore(seed)
        except BrokenError:
            return True
    return False


@dataclass(kw_only=True, slots=True)
class Mbarrier:
    """Arrivals and bytes to come in this phase; `phase` counts those that are over."""

    count: int
    pending: int = 0
    bytes_due: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, num_bytes: int = 0) -> None:
        """One arrival, and so many bytes more to wait for."""
        if self.pending == 0:
            raise BrokenError("one arrival too many in a phase")
        self.pending -= 1
        self.bytes_due += num_bytes
        self.turn()

    def complete(self, num_bytes: int) -> None:
        """The copy engine has written so many bytes."""
        self.bytes_due -= num_bytes  # may run below zero: a peer's copy can be ahead of the expectation
        self.turn()

    def turn(self) -> None:
        """To the next phase, if nothing is missing in this one."""
        if self.pending == 0 and self.bytes_due == 0:
            self.phase += 1
            self.pending = self.count

    def is_over(self, parity: int) -> bool:
        """mbarrier.try_wait.parity: the phase of this parity is over."""
        return self.phase % 2 != parity


@dataclass(kw_only=True, slots=True)
class NamedBarrier:
    """bar.sync and bar.arrive of so many warps; `round` counts how often they have met."""

    num_warps: int
    arrived: int = 0
    round: int = 0

    def arrive(self) -> Waits:
        """What bar.sync waits for after it."""
        met = self.round + 1
        self.arrived += 1
        if self.arrived == self.num_warps:
            self.arrived, self.round = 0, met
        return lambda: self.round >= met


def play(roles: list[Role], flying: list[Callable[[], None]], rng: random.Random) -> None:
    """Until all roles are done and all that flies has landed; BrokenError where none can go on.

    One of the roles is slow, so that others come as far ahead of it as they can.
    """
    slow = rng.choice(roles)
    begun = [(role, next(role, None)) for role in roles]
    waiting = [(role, waits) for role, waits in begun if waits is not None]
    while waiting or flying:
        ready = [i for i, (_, waits) in enumerate(waiting) if waits()]
        choice = rng.randrange(len(ready) + len(flying)) if ready or flying else None
        if choice is None:
            raise BrokenError(f"deadlock: {len(waiting)} roles wait")
        if choice >= len(ready):
            flying.pop(choice - len(ready))()
            continue
        role = waiting[ready[choice]][0]
        if role is slow and len(ready) + len(flying) > 1 and rng.random() < SLOWNESS:
            continue
        following = next(role, None)
        if following is None:
            del waiting[ready[choice]]
        else:
            waiting[ready[choice]] = (role, following)


@dataclass(kw_only=True, slots=True)
class Stage:
    """A stage of a block's ring, and what lies in it."""

    full: Mbarrier
    empty: Mbarrier
    holds: dict[str, list[object]] = field(default_factory=lambda: {"a": [None] * 2, "b": [None] * 2})
    readers: int = 0  # warps between their wait on full and their release
    blanked: set[tuple[int, int]] = field(default_factory=set)  # by which warps of which warpgroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernel is, and what a planted mistake makes of it."""

    num_stages: int = 4
    multicasts: bool = True
    skew_blocks: int = 2
    load_phase: int = 1  # of the loader's first wait on `empty`
    releases_last: bool = True
    releases_peer: bool = True
    expects_peers_half: bool = True
    num_arrivals: int = CLUSTER * WARPGROUPS * WARPS
    blanks: bool = True
    blanks_full_stage: bool = True
    meets_after_blanking: bool = True


@dataclass(slots=True)
class Place:
    """Where in the ring a role stands (RingPlace)."""

    stage: int = 0
    phase: int = 0

    def advance(self, num_stages: int) -> None:
        """To the next stage; the parity turns with the ring."""
        self.stage += 1
        if self.stage == num_stages:
            self.stage, self.phase = 0, self.phase ^ 1


class Cluster:
    """Two blocks and the roles in them: the first of num_clusters, which take the pairs of tiles in turn."""

    def __init__(self, design: Design, job: Job, seed: int, num_clusters: int = 1) -> None:
        self.design, self.job, self.random = design, job, random.Random(seed)
        turns = range(0, job.num_tile_pairs(), num_clusters)
        self.tiles = [[job.tile_at(idx, rank) for idx in turns] for rank in range(CLUSTER)]
        self.blocks = [
            [Stage(full=Mbarrier(count=1), empty=Mbarrier(count=design.num_arrivals)) for _ in range(4)]
            for _ in range(CLUSTER)
        ]
        self.flying: list[Callable[[], None]] = []  # copies under way: they land in any order
        self.skews = [NamedBarrier(num_warps=WARPGROUPS * WARPS) for _ in range(CLUSTER)]
        self.meetings = [[NamedBarrier(num_warps=WARPS) for _ in range(WARPGROUPS)] for _ in range(CLUSTER)]
        self.places: dict[tuple[str, ...], Place] = {}
        self.num_products = 0

    def roles(self) -> list[Role]:
        """Both blocks' loading warps and all warps that multiply."""
        loaders = [self.load_tiles(rank) for rank in range(CLUSTER)]
        warps = [
            self.multiply_tiles(rank, group, warp)
            for rank in range(CLUSTER)
            for group in range(WARPGROUPS)
            for warp in range(WARPS)
        ]
        return [*loaders, *warps]

    def is_shared(self, tile: ProductTile, operand: str) -> bool:
        """Rows are `a` but where the job swaps."""
        return self.design.multicasts and (tile.shares_rows != self.job.swaps) == (operand == "a")

    def content(self, rank: int, tile: ProductTile, operand: str, k_block: int) -> object:
        """Which lines of which k block, and for whom they came."""
        line = tile.row if (operand == "a") != self.job.swaps else tile.column
        return tile.idx, line, k_block, "both" if self.is_shared(tile, operand) else rank

    # ---- the loading warp ----

    def load_tiles(self, rank: int) -> Role:
        """load_tiles of grouped_gemm_sm90.cuh."""
        design = self.design
        place = self.places["load", str(rank)] = Place(phase=design.load_phase)
        for tile in self.tiles[rank]:
            for k_block in range(tile.num_k_blocks):
                stage = self.blocks[rank][place.stage]
                yield partial(stage.empty.is_over, place.phase)
                expected = BYTES_A + BYTES_B
                if design.multicasts and not design.expects_peers_half:
                    expected -= (BYTES_A if self.is_shared(tile, "a") else BYTES_B) // 2
                stage.full.arrive(expected)
                yield lambda: True
                for operand in ("a", "b"):
                    self.copy(rank, place.stage, operand, tile, k_block)
                    yield lambda: True
                place.advance(design.num_stages)

    def copy(self, rank: int, stage: int, operand: str, tile: ProductTile, k_block: int) -> None:
        """Both halves of an operand to this block, or this block's half to both."""
        is_shared = self.is_shared(tile, operand)
        num_bytes = (BYTES_A if operand == "a" else BYTES_B) // 2
        arrived = self.content(rank, tile, operand, k_block)
        for half in [rank] if is_shared else [0, 1]:
            for target in range(CLUSTER) if is_shared else [rank]:
                stage_there = self.blocks[target][stage]
                self.flying.append(partial(self.land, stage_there, operand, half, arrived, num_bytes))

    def land(self, stage: Stage, operand: str, half: int, what: object, num_bytes: int) -> None:
        """One half of an operand is there."""
        if stage.readers:
            raise BrokenError("a stage is overwritten while it is read")
        stage.holds[operand][half] = what
        stage.blanked.clear()
        stage.full.complete(num_bytes)

    # ---- a warp of a multiplying warpgroup ----

    def multiply_tiles(self, rank: int, group: int, warp: int) -> Role:
        """multiply_tiles of grouped_gemm_sm90.cuh, and multiply_tile."""
        design = self.design
        place = self.places["multiply", str(rank), str(group), str(warp)] = Place()
        is_skewing = design.skew_blocks > 0
        for tile in self.tiles[rank]:
            if is_skewing and group == 1:
                yield self.skews[rank].arrive()
                is_skewing = False
            previous = 0
            for k_block in range(tile.num_k_blocks):
                stage = self.blocks[rank][place.stage]
                if not design.blanks_full_stage:
                    yield from self.prepare(rank, group, warp, stage, tile.num_lines - k_block * DEPTH_BLOCK)
                yield partial(stage.full.is_over, place.phase)
                stage.readers += 1
                if is_skewing and k_block == design.skew_blocks:
                    self.skews[rank].arrive()
                    is_skewing = False
                if design.blanks_full_stage:
                    yield from self.prepare(rank, group, warp, stage, tile.num_lines - k_block * DEPTH_BLOCK)
                self.read(rank, group, stage, tile, k_block)
                yield lambda: True
                if k_block > 0:  # the product ahead of this one is over
                    self.release(rank, previous)
                previous = place.stage
                place.advance(design.num_stages)
            if tile.num_k_blocks > 0 and design.releases_last:
                yield lambda: True
                self.release(rank, previous)
            if is_skewing:
                self.skews[rank].arrive()
                is_skewing = False

    def prepare(self, rank: int, group: int, warp: int, stage: Stage, num_lines: int) -> Role:
        """WeightGradientSm90::prepare: this warp's part of the zeros, then the warpgroup meets."""
        if num_lines <= 0 or num_lines >= DEPTH_BLOCK or not self.design.blanks:
            return
        yield lambda: True
        stage.blanked.add((group, warp))
        if self.design.meets_after_blanking:
            yield self.meetings[rank][group].arrive()

    def read(self, rank: int, group: int, stage: Stage, tile: ProductTile, k_block: int) -> None:
        """A product is issued: the stage must hold what it is of."""
        for operand, halves in stage.holds.items():
            wanted = self.content(rank, tile, operand, k_block)
            if halves != [wanted, wanted]:
                raise BrokenError(f"{operand} of {wanted} is {halves}")
        ends_here = tile.num_lines > 0 and tile.num_lines - k_block * DEPTH_BLOCK < DEPTH_BLOCK
        if ends_here and not {(group, warp) for warp in range(WARPS)} <= stage.blanked:
            raise BrokenError(f"rows past the expert's last are read in block {k_block} of {tile}")
        self.num_products += 1

    def release(self, rank: int, stage: int) -> None:
        """release_stage: both blocks' loaders are told."""
        own = self.blocks[rank][stage]
        own.readers -= 1
        for target in range(CLUSTER) if self.design.releases_peer else [rank]:
            self.blocks[target][stage].empty.arrive()

    def run(self) -> None:
        """All roles, in an order drawn from the seed."""
        play(self.roles(), self.flying, self.random)

    def check_end(self) -> None:
        """All roles stand at the same place, and every product was made."""
        by_rank = [sum(tile.num_k_blocks for tile in tiles) for tiles in self.tiles]
        num_blocks = by_rank[0]
        if by_rank != [num_blocks] * CLUSTER:
            raise BrokenError(f"the blocks make {by_rank} products")
        if self.num_products != num_blocks * CLUSTER * WARPGROUPS * WARPS:
            raise BrokenError("a product is missing")
        wanted = Place()
        for _ in range(num_blocks):
            wanted.advance(self.design.num_stages)
        for name, place in self.places.items():
            start = self.design.load_phase if name[0] == "load" else 0
            if (place.stage, place.phase ^ start) != (wanted.stage, wanted.phase):
                raise BrokenError(f"{name} ends at {place}, wanted {wanted}")
        for block in self.blocks:
            for stage in block[: self.design.num_stages]:
                barriers_agree = stage.full.phase == stage.empty.phase
                if not barriers_agree or stage.readers or stage.full.bytes_due:
                    raise BrokenError(f"a stage ends as {stage}")


def explore(design: Design, job: Job, seed: int, num_clusters: int = 1) -> None:
    """A cluster's tiles under one order of events."""
    cluster = Cluster(design, job, seed, num_clusters)
    cluster.run()
    cluster.check_end()
