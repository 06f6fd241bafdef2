"""A model of the sm_90a pipeline: loads, products and barriers of a cluster, step by step in any order.

No GPU has to be at hand to see a deadlock or a stage overwritten too early. The model follows
csrc/gemm/grouped_gemm_sm90.cuh and tile_product_sm90.cuh line by line: each block has a loading warp and two
warpgroups of four warps, a ring of stages, and two barriers a stage with phases as mbarriers have them. Roles
are coroutines that yield at every wait and at everything another role can see; a seed decides who goes on.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CLUSTER, WARPGROUPS, WARPS = 2, 2, 4
BYTES_A, BYTES_B = 2, 4  # of a stage, in units of half an operand

Waits = Callable[[], bool]
Role = Iterator[Waits]


class BrokenError(AssertionError):
    """The pipeline did what it must not."""


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
        if self.pending == 0:
            raise BrokenError("one arrival too many in a phase")
        self.pending -= 1
        self.bytes_due += num_bytes
        self.turn()

    def complete(self, num_bytes: int) -> None:
        self.bytes_due -= num_bytes  # may run below zero: a peer's copy can be ahead of the expectation
        self.turn()

    def turn(self) -> None:
        if self.pending == 0 and self.bytes_due == 0:
            self.phase += 1
            self.pending = self.count

    def is_over(self, parity: int) -> bool:
        """mbarrier.try_wait.parity: the phase of this parity is over."""
        return self.phase % 2 != parity


@dataclass(kw_only=True, slots=True)
class Stage:
    full: Mbarrier
    empty: Mbarrier
    holds: dict[str, list[object]] = field(default_factory=lambda: {"a": [None] * 2, "b": [None] * 2})
    readers: int = 0  # warps between their wait on full and their release


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One pair of tiles: its depth, and which operand both blocks share."""

    name: int
    num_k_blocks: int
    shares_a: bool


@dataclass(slots=True)
class Place:
    stage: int = 0
    phase: int = 0

    def advance(self, num_stages: int) -> None:
        self.stage += 1
        if self.stage == num_stages:
            self.stage, self.phase = 0, self.phase ^ 1


class Cluster:
    """Two blocks and the roles in them."""

    def __init__(self, design: Design, tiles: list[Tile], seed: int) -> None:
        self.design, self.tiles, self.random = design, tiles, random.Random(seed)
        self.blocks = [
            [Stage(full=Mbarrier(count=1), empty=Mbarrier(count=design.num_arrivals)) for _ in range(4)]
            for _ in range(CLUSTER)
        ]
        self.flying: list[Callable[[], None]] = []  # copies under way: they land in any order
        self.skew_arrivals = [0] * CLUSTER
        self.places: dict[tuple[str, ...], Place] = {}
        self.num_products = 0

    def roles(self) -> list[Role]:
        loaders = [self.load_tiles(rank) for rank in range(CLUSTER)]
        warps = [
            self.multiply_tiles(rank, group, warp)
            for rank in range(CLUSTER)
            for group in range(WARPGROUPS)
            for warp in range(WARPS)
        ]
        return [*loaders, *warps]

    # ---- the loading warp ----

    def load_tiles(self, rank: int) -> Role:
        design = self.design
        place = self.places["load", str(rank)] = Place(phase=design.load_phase)
        for tile in self.tiles:
            for k_block in range(tile.num_k_blocks):
                stage = self.blocks[rank][place.stage]
                yield partial(stage.empty.is_over, place.phase)
                expected = BYTES_A + BYTES_B
                if design.multicasts and not design.expects_peers_half:
                    expected -= (BYTES_A if tile.shares_a else BYTES_B) // 2
                stage.full.arrive(expected)
                yield lambda: True
                for operand, num_bytes in (("a", BYTES_A), ("b", BYTES_B)):
                    is_shared = design.multicasts and tile.shares_a == (operand == "a")
                    self.copy(rank, place.stage, operand, (tile.name, k_block), num_bytes, is_shared)
                    yield lambda: True
                place.advance(design.num_stages)

    def copy(
        self, rank: int, stage: int, operand: str, what: tuple[int, int], num_bytes: int, is_shared: bool
    ) -> None:
        """Both halves of an operand to this block, or this block's half to both."""
        halves = [rank] if is_shared else [0, 1]
        targets = range(CLUSTER) if is_shared else [rank]
        for half in halves:
            for target in targets:
                arrived = (*what, "shared" if is_shared else rank)
                stage_there = self.blocks[target][stage]
                self.flying.append(partial(self.land, stage_there, operand, half, arrived, num_bytes // 2))

    def land(self, stage: Stage, operand: str, half: int, what: object, num_bytes: int) -> None:
        if stage.readers:
            raise BrokenError("a stage is overwritten while it is read")
        stage.holds[operand][half] = what
        stage.full.complete(num_bytes)

    # ---- a warp of a multiplying warpgroup ----

    def multiply_tiles(self, rank: int, group: int, warp: int) -> Role:
        design = self.design
        place = self.places["multiply", str(rank), str(group), str(warp)] = Place()
        is_skewing = design.skew_blocks > 0
        for tile in self.tiles:
            if is_skewing and group == 1:
                yield lambda: self.skew_arrivals[rank] == WARPS
                is_skewing = False
            previous = 0
            for k_block in range(tile.num_k_blocks):
                stage = self.blocks[rank][place.stage]
                yield partial(stage.full.is_over, place.phase)
                if is_skewing and k_block == design.skew_blocks:
                    self.skew_arrivals[rank] += 1
                    is_skewing = False
                self.read(rank, stage, tile, k_block)
                yield lambda: True
                if k_block > 0:  # the product ahead of this one is over
                    self.release(rank, previous)
                previous = place.stage
                place.advance(design.num_stages)
            if tile.num_k_blocks > 0 and design.releases_last:
                yield lambda: True
                self.release(rank, previous)
            if is_skewing:
                self.skew_arrivals[rank] += 1
                is_skewing = False

    def read(self, rank: int, stage: Stage, tile: Tile, k_block: int) -> None:
        for operand, halves in stage.holds.items():
            is_shared = self.design.multicasts and tile.shares_a == (operand == "a")
            wanted = (tile.name, k_block, "shared" if is_shared else rank)
            if halves != [wanted, wanted]:
                raise BrokenError(f"{operand} of {wanted} is {halves}")
        stage.readers += 1
        self.num_products += 1

    def release(self, rank: int, stage: int) -> None:
        own = self.blocks[rank][stage]
        own.readers -= 1
        for target in range(CLUSTER) if self.design.releases_peer else [rank]:
            self.blocks[target][stage].empty.arrive()

    # ---- all of them, in an order drawn from the seed ----

    def run(self) -> None:
        begun = [(role, next(role, None)) for role in self.roles()]
        waiting = [(role, waits) for role, waits in begun if waits is not None]
        while waiting or self.flying:
            ready = [i for i, (_, waits) in enumerate(waiting) if waits()]
            choice = self.random.randrange(len(ready) + len(self.flying)) if ready or self.flying else None
            if choice is None:
                raise BrokenError(f"deadlock: {len(waiting)} roles wait")
            if choice >= len(ready):
                self.flying.pop(choice - len(ready))()
                continue
            role = waiting[ready[choice]][0]
            following = next(role, None)
            if following is None:
                del waiting[ready[choice]]
            else:
                waiting[ready[choice]] = (role, following)

    def check_end(self) -> None:
        """All roles stand at the same place, and every product was made."""
        num_blocks = sum(tile.num_k_blocks for tile in self.tiles)
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


def explore(design: Design, depths: list[int], seed: int) -> None:
    """A cluster's tiles of these depths, under one order of events."""
    chance = random.Random(seed)
    tiles = [
        Tile(name=i, num_k_blocks=depth, shares_a=chance.random() < 0.5) for i, depth in enumerate(depths)
    ]
    cluster = Cluster(design, tiles, seed)
    cluster.run()
    cluster.check_end()


designs = st.builds(
    Design, num_stages=st.integers(2, 4), multicasts=st.booleans(), skew_blocks=st.integers(0, 3)
).filter(lambda design: design.skew_blocks < design.num_stages)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    design=designs,
    depths=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 9]), max_size=7),
    seed=st.integers(0, 2**32),
)
def test_any_tiles_in_any_order_come_to_an_end_in_step(design: Design, depths: list[int], seed: int) -> None:
    explore(design, depths, seed)


@pytest.mark.parametrize("depths", [[], [0], [1], [0, 0, 0], [1] * 9, [0, 1, 0, 4, 0], [12], [4, 4, 4]])
@pytest.mark.parametrize(("num_stages", "skew_blocks"), [(2, 0), (2, 1), (3, 2), (4, 2)])
def test_few_blocks_of_depth(depths: list[int], num_stages: int, skew_blocks: int) -> None:
    for seed in range(5):
        explore(Design(num_stages=num_stages, skew_blocks=skew_blocks), depths, seed)


MISTAKES = {
    "the loader waits for the wrong phase first": Design(load_phase=0),
    "the last stage of a tile is not released": Design(releases_last=False),
    "the peer's loader is not told": Design(releases_peer=False),
    "one block's warps are not counted": Design(num_arrivals=WARPGROUPS * WARPS),
    "a warp more is counted": Design(num_arrivals=CLUSTER * WARPGROUPS * WARPS + 1),
    "the peer's half is not expected": Design(expects_peers_half=False),
    "one stage, while a product stays in flight": Design(num_stages=1, skew_blocks=0),
    "the skew takes the whole ring": Design(num_stages=2, skew_blocks=2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    def breaks(seed: int) -> bool:
        try:
            explore(MISTAKES[mistake], [3, 6, 9], seed)
        except BrokenError:
            return True
        return False

    assert any(breaks(seed) for seed in range(20))


def test_a_stage_released_before_it_is_read_is_seen() -> None:
    """Were a stage released when its product is issued, the next copy would meet its readers."""

    class Hasty(Cluster):
        def read(self, rank: int, stage: Stage, tile: Tile, k_block: int) -> None:
            super().read(rank, stage, tile, k_block)
            for target in range(CLUSTER):
                self.blocks[target][self.blocks[rank].index(stage)].empty.arrive()

        def release(self, rank: int, stage: int) -> None:
            self.blocks[rank][stage].readers -= 1

    tiles = [Tile(name=i, num_k_blocks=9, shares_a=False) for i in range(2)]
    clusters = [Hasty(Design(num_stages=3), tiles, seed) for seed in range(20)]
    with pytest.raises(BrokenError, match=r"overwritten while it is read|one arrival too many"):
        list(map(Cluster.run, clusters))
