"""The slots and flags of csrc/comm as programs of blocks, for dscoder.testing.weak_memory to run.

Step by step what csrc/comm/comm.h says: a launch's blocks read the epoch, wait for all peers, write or read
their share of the rows, and are counted; the last one moves the epoch on and tells every peer. A rank's steps
are dispatch_send, dispatch_receive, combine_send, combine_receive, again and again: forward and backward of a
training step are two such rounds, whichever of them carries gradients. `Design` can plant mistakes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from dscoder.testing.pipeline import BrokenError
from dscoder.testing.weak_memory import Explored, Mishaps, explore
from dscoder.testing.weak_memory_steps import Actor, Await, Count, Load, Meet, Set, Step, Value, Write

WAYS = ("dispatch", "combine")
ORDERS = frozenset(
    {"release arrived", "release freed", "acquire arrived", "acquire freed", "count send", "count receive"}
)
FAILED, OVER = -1, -2  # places in a program that are not known yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernels do, and what a planted mistake makes of it."""

    data_before_flag: bool = True
    copies_before_free: bool = True
    waits_for_free: bool = True
    all_blocks_wait: bool = True
    waits_for_idle_peers: bool = True  # a sender, for peers that it has nothing for
    tells_idle_peers: bool = True
    free_epoch: int = -1  # that a sender of epoch 0 waits for
    arrived_epoch: int = 0  # that a receiver of epoch 0 waits for
    counts_blocks: bool = True  # the last block tells, else each one
    resets_count: bool = True
    has_epoch_word: bool = True
    last_moves_epoch: bool = True
    orders: frozenset[str] = ORDERS
    count_in_flag: bool = True
    epoch_in_flag: bool = True  # else a flag is 1 or 0, and its reader takes it back
    own_slots: bool = True  # dispatch and combine do not share theirs
    sends_first: bool = True
    has_limit: bool = True
    fails_for_good: bool = True
    failed_blocks_tell: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """How much there is of everything."""

    ranks: int = 2
    blocks: int = 2
    slots: int = 1  # rows from a rank to another, at the most
    ways: str = "DCDC"  # dispatch and combine, one after the other
    is_exact: bool = False  # a kernel waits for the counts, for the host, ahead of the one that receives
    is_uneven: bool = False  # some ranks have nothing for some others, by turns
    is_together: bool = False  # sends and receives of all ranks in one grid
    tells_in_turn: bool = False  # a step a peer, so that a rank may die in between
    streams: int = 1  # 2: each way has its own; a combine sends behind its dispatch

    def num_rows(self, source: int, target: int, epoch: int) -> int:
        """That travel with dispatch, and back with combine."""
        is_idle = self.is_uneven and (source + target + epoch) % 2 == 1
        return 0 if is_idle else self.slots


class Writer:
    """The program of a block, as far as it is written."""

    def __init__(self, design: Design, shape: Shape, rank: int, block: int) -> None:
        self.design, self.shape, self.rank, self.block = design, shape, rank, block
        self.steps: list[Step] = []

    def launch(self, way: str, role: str, epoch: int, came: int) -> None:
        """One kernel: send_dispatch, receive_dispatch, send_combine or receive_combine.

        `came` is the epoch of the last dispatch.
        """
        design, begin = self.design, len(self.steps)
        words = self.rows(way, epoch, is_sender=role == "send")
        share: list[Step] = [Write(word, epoch) if role == "send" else Load(word, epoch) for word in words]
        counted = f"{way} {role} epoch of {self.rank}"
        if self.design.has_epoch_word:
            self.steps.append(Load(counted))
        if (way, role) == ("dispatch", "receive"):
            share.append(Write(f"output {epoch} of {self.rank} {self.block}", epoch))
        self.wait(way, role, epoch)
        if self.design.has_epoch_word:
            self.steps.append(Load(counted, epoch - 1))  # a rank that has failed does not move it on
        if (way, role) == ("combine", "send"):  # what it sends was made of what came last
            outputs = [f"output {came} of {self.rank} {block}" for block in range(self.shape.blocks)]
            share = [*(Load(output, came) for output in outputs), *share]
        is_early = not (design.data_before_flag if role == "send" else design.copies_before_free)
        if is_early:
            self.end(way, role, epoch)
            ended = len(self.steps)
            self.steps += share
        else:
            self.steps += share
            self.end(way, role, epoch)
            ended = len(self.steps)
        self.land(begin, ended)

    def wait(self, way: str, role: str, epoch: int) -> None:
        """wait_until_freed, wait_for_rows."""
        design, peers = self.design, list(range(self.shape.ranks))
        what = "freed" if role == "send" else "arrived"
        if role == "send":
            if not design.waits_for_free or (self.block and not design.all_blocks_wait):
                return
            if not design.waits_for_idle_peers:
                peers = [peer for peer in peers if self.count_of(way, self.rank, peer, epoch)]
        wanted = epoch + (design.free_epoch if role == "send" else design.arrived_epoch)
        counts = [self.count_of(way, peer, self.rank, wanted) if wanted > 0 else 0 for peer in peers]
        self.steps.append(
            Await(
                tuple(f"{way} {what} {peer} at {self.rank}" for peer in peers),
                tuple(self.flag(what, max(wanted, 0), count) for count in counts),
                self.failure(way, role, epoch),
                FAILED,
                f"acquire {what}" in design.orders,
            )
        )
        if what == "arrived" and not design.count_in_flag:
            self.steps += [
                Load(f"{way} count {peer} at {self.rank}", count)
                for peer, count in zip(peers, counts, strict=True)
            ]

    def failure(self, way: str, role: str, epoch: int) -> str | None:
        """The flag that says that a wait was in vain: is_failed."""
        if not self.design.has_limit:
            return None
        own = f"rank {self.rank} failed"
        return own if self.design.fails_for_good else f"{own} in {way} {role} {epoch}"

    def flag(self, what: str, epoch: int, count: int) -> Value:
        """comm_flag."""
        if what == "freed":
            return epoch, 0
        number = epoch if self.design.epoch_in_flag else min(epoch, 1)
        return number, count if self.design.count_in_flag else 0

    def end(self, way: str, role: str, epoch: int) -> None:
        """end_step: the last block tells."""
        design, counter = self.design, f"{way} {role} done of {self.rank}"
        moves_epoch: list[Step] = []
        if design.has_epoch_word:
            moves_epoch.append(Write(f"{way} {role} epoch of {self.rank}", epoch))
        if design.counts_blocks:
            is_ordered = f"count {role}" in design.orders
            self.steps.append(Count(counter, self.shape.blocks, OVER, is_ordered, design.resets_count))
        if design.last_moves_epoch:
            self.steps += moves_epoch
        else:
            self.steps[-1:-1] = moves_epoch
        self.tell(way, role, epoch)

    def tell(self, way: str, role: str, epoch: int) -> None:
        """The flags at all peers."""
        design, what = self.design, "arrived" if role == "send" else "freed"
        peers = list(range(self.shape.ranks))
        counts = [self.count_of(way, self.rank, peer, epoch) if role == "send" else 0 for peer in peers]
        if role == "send" and not design.tells_idle_peers:
            peers = [peer for peer in peers if counts[peer]]
        flags = [f"{way} {what} {self.rank} at {peer}" for peer in peers]
        values = [self.flag(what, epoch, counts[peer]) for peer in peers]
        is_release = f"release {what}" in design.orders
        if self.shape.tells_in_turn:
            pairs = zip(flags, values, strict=True)
            self.steps += [Set((flag,), (value,), is_release) for flag, value in pairs]
        else:
            self.steps.append(Set(tuple(flags), tuple(values), is_release))
        if role == "send" and not design.count_in_flag:
            self.steps += [Write(f"{way} count {self.rank} at {peer}", counts[peer]) for peer in peers]
        if role == "receive" and not design.epoch_in_flag:
            own = tuple(f"{way} arrived {peer} at {self.rank}" for peer in peers)
            self.steps.append(Set(own, ((0, 0),) * len(own)))

    def land(self, begin: int, ended: int) -> None:
        """Fill in where the launch's jumps go: behind end_step, or to the launch's end."""
        over = len(self.steps)
        counts = [i for i in range(begin, over) if isinstance(self.steps[i], Count)]
        failed = counts[0] if self.design.failed_blocks_tell and counts else over
        for i in range(begin, over):
            match self.steps[i]:
                case Await(if_failed=target) as step if target == FAILED:
                    self.steps[i] = replace(step, if_failed=failed)
                case Count(if_not_last=target) as step if target == OVER:
                    self.steps[i] = replace(step, if_not_last=ended)

    def count_of(self, way: str, source: int, target: int, epoch: int) -> int:
        """Rows from `source` to `target` on this way."""
        there, back = (source, target) if way == "dispatch" else (target, source)
        return self.shape.num_rows(there, back, epoch)

    def rows(self, way: str, epoch: int, *, is_sender: bool) -> list[str]:
        """This block's share of the slots it writes or reads."""
        slots = way if self.design.own_slots else "both"
        found = []
        for peer in range(self.shape.ranks):
            pair = (self.rank, peer) if is_sender else (peer, self.rank)
            count = self.count_of(way, *pair, epoch)
            found += [f"{slots} slot {position} of {pair[0]} at {pair[1]}" for position in range(count)]
        return found[self.block :: self.shape.blocks]


def actors_of(design: Design, shape: Shape) -> list[Actor]:
    """Every block of every rank, and all of its launches."""
    roles = ("send", "receive") if design.sends_first else ("receive", "send")
    plans: dict[str, tuple[Sequence[str], Sequence[str]]]
    if shape.is_together:
        plans = {f" {role}": (WAYS, (role,)) for role in roles}
    elif shape.streams == 2:
        plans = {f" {way}": ((way,), roles) for way in WAYS}
    else:
        plans = {"": (WAYS, roles)}
    found = []
    for rank, block, (name, plan) in product(range(shape.ranks), range(shape.blocks), plans.items()):
        program = program_of(Writer(design, shape, rank, block), *plan)
        stream = "all" if shape.is_together else f"{rank}{name}"
        found.append(Actor(f"rank {rank} block {block}{name}", rank, stream, program))
    return found


def program_of(writer: Writer, ways: Sequence[str], roles: Sequence[str]) -> tuple[Step, ...]:
    """The launches of these ways and roles. On two streams an event makes a combine wait for its dispatch."""
    shape, steps = writer.shape, writer.steps
    has_events = shape.streams == 2
    epochs = dict.fromkeys(WAYS, 0)
    for way in (WAYS["DC".index(letter)] for letter in shape.ways):
        epochs[way] += 1
        event = f"dispatch {epochs['dispatch']} over at {writer.rank} {writer.block}"
        for role in roles if way in ways else ():
            if has_events and (way, role) == ("combine", "send"):
                steps.append(Await((event,), ((1, 0),)))
            if shape.is_exact and (way, role) == ("dispatch", "receive"):
                writer.wait(way, role, epochs[way])
                writer.land(len(steps) - 1, len(steps))
                steps.append(Meet())
            writer.launch(way, role, epochs[way], epochs["dispatch"])
            if has_events and (way, role) == ("dispatch", "receive"):
                steps.append(Set((event,), ((1, 0),)))
            steps.append(Meet())
    return tuple(steps)


def check(design: Design, shape: Shape, mishaps: Mishaps | None = None) -> Explored:
    """Every order of steps; BrokenError for rows that are lost or wrong, for waits without end, and for
    records that do not lead from rank to rank to the one that died.
    """
    explored = explore(actors_of(design, shape), mishaps)
    if mishaps is None or not mishaps.is_hasty:
        for records, dead in explored.ends:
            _check_records(records, dead)
    return explored


def _check_records(records: Sequence[int], dead: int) -> None:
    for rank, peer in enumerate(records):
        seen = {rank}
        while peer >= 0 and peer != dead:
            if peer in seen:
                raise BrokenError(f"records {list(records)} lead in a circle, rank {dead} died")
            seen.add(peer)
            peer = records[peer]
        if peer < 0 <= records[rank]:
            raise BrokenError(f"records {list(records)} end at a rank that has none, rank {dead} died")
