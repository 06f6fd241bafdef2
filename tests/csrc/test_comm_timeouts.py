"""An exchange whose peer does not come, on the host executor: every wait ends, and says what it waited for.

The executor's clock ticks a microsecond a look, so a wait of a millisecond is a thousand polls.
"""

import ctypes
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dscoder.testing.virtual_ranks import VirtualRanks

NUM_RANKS, MAX_TOKENS, WIDTH, NUM_TOPK = 3, 4, 8, 2
WAYS = ("dispatch", "combine")
COPIES = ["words", "bulk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Tensors of one step for all ranks: every token goes to every rank."""

    x: list[Tensor]
    slot: list[Tensor]
    sent: list[Tensor]
    rows: list[Tensor]
    came: list[Tensor]
    idx: list[Tensor]
    weight: list[Tensor]
    out: list[Tensor]
    out_weight: list[Tensor]


def ranks_of(host_ops: ModuleType, *, copy: str = "words", timeout: float = 1e-3) -> VirtualRanks:
    return VirtualRanks(
        host_ops,
        num_ranks=NUM_RANKS,
        max_tokens=MAX_TOKENS,
        row_bytes=4 * WIDTH,
        num_topk=NUM_TOPK,
        timeout=timeout,
        copy=copy,
        num_blocks=2,
    )


def step_of(num_tokens: int = 2) -> Step:
    def full(*shape: int, value: float = 77, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.full(shape, value, dtype=dtype) for _ in range(NUM_RANKS)]

    num_rows = NUM_RANKS * MAX_TOKENS
    slot_TR = torch.arange(num_tokens, dtype=torch.int32)[:, None].repeat(1, NUM_RANKS)
    return Step(
        x=full(num_tokens, WIDTH, value=1.5),
        slot=[slot_TR] * NUM_RANKS,
        sent=full(NUM_RANKS, value=num_tokens, dtype=torch.int32),
        rows=full(num_rows, WIDTH),
        came=full(NUM_RANKS, dtype=torch.int32),
        idx=full(num_rows, NUM_TOPK, dtype=torch.int32),
        weight=full(num_rows, NUM_TOPK),
        out=full(num_tokens, WIDTH),
        out_weight=full(num_tokens, NUM_TOPK),
    )


def send(host_ops: ModuleType, ranks: VirtualRanks, step: Step, *which: int) -> None:
    picked = [[values[r] for r in which] for values in (ranks.buffers, step.x, step.slot, step.sent)]
    host_ops.dispatch_send(*picked)


def receive(host_ops: ModuleType, ranks: VirtualRanks, step: Step, *which: int) -> None:
    lists = (ranks.buffers, step.rows, step.came, step.idx, step.weight)
    host_ops.dispatch_receive(*([values[r] for r in which] for values in lists), num_local_experts=1)


def send_back(host_ops: ModuleType, ranks: VirtualRanks, step: Step, *which: int) -> None:
    host_ops.combine_send(*([values[r] for r in which] for values in (ranks.buffers, step.rows, step.came)))


def add_up(host_ops: ModuleType, ranks: VirtualRanks, step: Step, *which: int) -> None:
    lists = (ranks.buffers, step.out, step.slot, step.sent, step.out_weight)
    host_ops.combine_receive(*([values[r] for r in which] for values in lists))


def failure(rank: int, peer: int, phase: str, expected: int, seen: int) -> dict[str, int | str]:
    return {"rank": rank, "peer": peer, "phase": phase, "expected": expected, "seen": seen}


def assert_failed_rows(step: Step, rank: int) -> None:
    assert bool(step.rows[rank].isnan().all())
    assert bool((step.idx[rank] == -1).all())
    assert bool(step.weight[rank].isnan().all())
    assert step.came[rank].tolist() == [0] * NUM_RANKS


# ---- who is named ----


@pytest.mark.parametrize("missing", range(NUM_RANKS))
@pytest.mark.parametrize("copy", COPIES)
def test_a_rank_that_never_sends_is_named(
    host_ops: ModuleType, host_kernels: ModuleType, copy: str, missing: int
) -> None:
    host_kernels.set_order(missing)
    ranks, step = ranks_of(host_ops, copy=copy), step_of()
    others = [rank for rank in range(NUM_RANKS) if rank != missing]
    send(host_ops, ranks, step, *others)
    receive(host_ops, ranks, step, *others)
    for rank in others:
        assert ranks.status()[rank] == failure(rank, missing, "dispatch_arrival", 1, 0)
        assert_failed_rows(step, rank)
    assert ranks.status()[missing] is None


@pytest.mark.parametrize("missing", range(NUM_RANKS))
def test_a_rank_that_never_sends_back_is_named(
    host_ops: ModuleType, host_kernels: ModuleType, missing: int
) -> None:
    host_kernels.set_order(missing)
    ranks, step = ranks_of(host_ops), step_of()
    everybody = range(NUM_RANKS)
    others = [rank for rank in everybody if rank != missing]
    send(host_ops, ranks, step, *everybody)
    receive(host_ops, ranks, step, *everybody)
    send_back(host_ops, ranks, step, *others)
    add_up(host_ops, ranks, step, *others)
    for rank in others:
        assert ranks.status()[rank] == failure(rank, missing, "combine_arrival", 1, 0)
        assert bool(step.out[rank].isnan().all())
        assert bool(step.out_weight[rank].isnan().all())


def test_a_rank_that_never_frees_is_named_by_the_next_send(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    host_kernels.set_order(1)
    ranks, step = ranks_of(host_ops), step_of()
    send(host_ops, ranks, step, 0, 1, 2)
    receive(host_ops, ranks, step, 0, 1)
    send(host_ops, ranks, step, 1)
    assert ranks.status() == [None, failure(1, 2, "dispatch_free", 1, 0), None]


def test_a_rank_that_never_adds_up_is_named_by_the_next_return(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    host_kernels.set_order(2)
    ranks, step = ranks_of(host_ops), step_of()
    everybody = range(NUM_RANKS)
    send(host_ops, ranks, step, *everybody)
    receive(host_ops, ranks, step, *everybody)
    send_back(host_ops, ranks, step, *everybody)
    add_up(host_ops, ranks, step, 1, 2)
    send_back(host_ops, ranks, step, 2)
    assert ranks.status()[2] == failure(2, 0, "combine_free", 1, 0)


def test_counts_that_are_not_told_end_in_zeros(host_ops: ModuleType) -> None:
    ranks, step = ranks_of(host_ops), step_of()
    send(host_ops, ranks, step, 0, 1)
    host_ops.dispatch_counts([ranks.buffers[1]], [step.came[1]])
    assert step.came[1].tolist() == [0] * NUM_RANKS
    assert ranks.status()[1] == failure(1, 2, "dispatch_arrival", 1, 0)


def test_nobody_hangs_in_one_grid_where_a_rank_is_missing(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    for order in range(4):
        host_kernels.set_order(order)
        ranks, step = ranks_of(host_ops), step_of()
        sent = (step.x[:2], step.slot[:2], step.sent[:2], None, None)
        received = (step.rows[:2], step.came[:2], step.idx[:2], step.weight[:2], None, 1)
        host_ops.dispatch_together(ranks.buffers[:2], sent, received)
        for rank in (0, 1):
            assert ranks.status()[rank] == failure(rank, 2, "dispatch_arrival", 1, 0)
            assert_failed_rows(step, rank)


# ---- what comes after ----


def test_a_failed_rank_fails_at_once_and_its_peers_after_it(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    host_kernels.set_order(3)
    ranks, step = ranks_of(host_ops), step_of()
    send(host_ops, ranks, step, 0, 1, 2)
    receive(host_ops, ranks, step, 1, 2)
    send(host_ops, ranks, step, 1)  # 0 has not freed
    first = ranks.status()[1]
    assert first is not None
    receive(host_ops, ranks, step, 0)  # late
    send(host_ops, ranks, step, 1)
    send(host_ops, ranks, step, 0, 2)
    receive(host_ops, ranks, step, 0, 1, 2)
    assert ranks.status()[1] == first, "the first failure stands"
    assert_failed_rows(step, 1)
    for rank in (0, 2):
        assert ranks.status()[rank] == failure(rank, 1, "dispatch_arrival", 2, 1)
    send_back(host_ops, ranks, step, 1)
    add_up(host_ops, ranks, step, 1)
    assert bool(step.out[1].isnan().all())


# A wait that lasts longer than the executor's patience: it would fault if the launch waited.
def test_a_failed_rank_does_not_wait_again(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    host_kernels.set_order(4)
    ranks, step = ranks_of(host_ops, timeout=600.0), step_of()
    ranks.buffers[0].fail()
    receive(host_ops, ranks, step, 0)
    assert_failed_rows(step, 0)
    assert ranks.status()[0] is None


def test_a_closed_buffer_keeps_its_status(host_ops: ModuleType) -> None:
    ranks, step = ranks_of(host_ops), step_of()
    receive(host_ops, ranks, step, 0)
    ranks.buffers[0].close()
    status = ranks.status()[0]
    assert status is not None
    assert status["phase"] == "dispatch_arrival"


# ---- flags and counts that do not fit ----


def control_offset(name: str, way: str = "dispatch", peer: int = 0) -> int:
    """Where a word of csrc/comm/comm_layout.h's CommControl lies."""
    max_ranks, word = 8, 8
    lists = {"arrived": 0, "freed": 2 * max_ranks * word}
    if name in lists:
        return lists[name] + (WAYS.index(way) * max_ranks + peer) * word
    counters = 4 * max_ranks * word
    return {"epoch": counters, "num_done": counters + 16}[name]


@pytest.mark.parametrize("stale", [0, 2, 7])
def test_a_flag_of_another_epoch_is_not_taken(
    host_ops: ModuleType, host_kernels: ModuleType, stale: int
) -> None:
    host_kernels.set_order(stale)
    ranks, step = ranks_of(host_ops), step_of()
    send(host_ops, ranks, step, 0, 1, 2)
    flag = ctypes.c_uint64.from_address(ranks.buffers[1].address + control_offset("arrived", peer=2))
    assert flag.value == 1 << 32 | 2
    flag.value = stale << 32 | 2
    receive(host_ops, ranks, step, 1)
    assert ranks.status()[1] == failure(1, 2, "dispatch_arrival", 1, stale)
    assert_failed_rows(step, 1)


def test_epochs_go_on_past_the_end_of_their_bits(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    host_kernels.set_order(6)
    ranks = ranks_of(host_ops)
    last = 2**32 - 1
    flags = product(("arrived", "freed"), WAYS, range(NUM_RANKS))
    places = [control_offset(name, way, peer) for name, way, peer in flags]
    for buffer in ranks.buffers:
        for place in places:
            ctypes.c_uint64.from_address(buffer.address + place).value = last << 32
        for counter in range(4):
            ctypes.c_uint32.from_address(buffer.address + control_offset("epoch") + 4 * counter).value = last
    everybody = range(NUM_RANKS)
    for _ in range(2):
        step = step_of()
        send(host_ops, ranks, step, *everybody)
        receive(host_ops, ranks, step, *everybody)
        send_back(host_ops, ranks, step, *everybody)
        host_ops.combine_receive(ranks.buffers, step.out, step.slot, step.sent)
        assert all(bool((out == 1.5 * NUM_RANKS).all()) for out in step.out)
    assert ranks.status() == [None] * NUM_RANKS


def test_more_rows_than_there_is_room_for_are_not_taken(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    host_kernels.set_order(8)
    ranks, step = ranks_of(host_ops), step_of()
    send(host_ops, ranks, step, 0, 1, 2)
    rows, came = torch.full((5, WIDTH), 77.0), torch.empty(NUM_RANKS, dtype=torch.int32)
    host_ops.dispatch_receive([ranks.buffers[0]], [rows], [came], row_begin=[[0, 2, 3, 5]])
    assert ranks.status()[0] == failure(0, 1, "dispatch_count", 1, 2)
    assert bool(rows.isnan().all())


def test_fewer_rows_back_than_went_out_are_not_added_up(
    host_ops: ModuleType, host_kernels: ModuleType
) -> None:
    host_kernels.set_order(9)
    ranks, step = ranks_of(host_ops), step_of()
    everybody = range(NUM_RANKS)
    send(host_ops, ranks, step, *everybody)
    receive(host_ops, ranks, step, *everybody)
    step.came[2][0] -= 1
    send_back(host_ops, ranks, step, *everybody)
    host_ops.combine_receive(ranks.buffers, step.out, step.slot, step.sent)
    assert ranks.status() == [failure(0, 2, "combine_count", 2, 1), None, None]
    assert bool(step.out[0].isnan().all())
    assert bool((step.out[1] == 1.5 * NUM_RANKS).all())


@pytest.mark.parametrize("copy", COPIES)
def test_wild_slots_and_counts_touch_no_other_memory(
    host_ops: ModuleType, host_kernels: ModuleType, copy: str
) -> None:
    host_kernels.set_order(10)
    ranks, step = ranks_of(host_ops, copy=copy), step_of()
    wild = torch.tensor([[-(2**31), MAX_TOKENS, 2**31 - 1], [0, 0, 0]], dtype=torch.int32)
    slots, counts = [wild] * NUM_RANKS, [torch.full((NUM_RANKS,), 2**31 - 1, dtype=torch.int32)] * NUM_RANKS
    host_ops.dispatch_send(ranks.buffers, step.x, slots, counts)
    receive(host_ops, ranks, step, 0, 1, 2)
    assert [count.tolist() for count in step.came] == [[MAX_TOKENS] * NUM_RANKS] * NUM_RANKS
    for count in step.came:
        count.fill_(2**31 - 1)
    send_back(host_ops, ranks, step, 0, 1, 2)
    host_ops.combine_receive(ranks.buffers, step.out, slots, counts)
    assert [out[0].tolist() for out in step.out] == [[0.0] * WIDTH] * NUM_RANKS
    assert [out[1].tolist() for out in step.out] == [[1.5 * NUM_RANKS] * WIDTH] * NUM_RANKS
    assert ranks.status() == [None] * NUM_RANKS
