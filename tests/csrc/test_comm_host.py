"""dispatch and combine on the host executor, several ranks in one process: the same bits as the reference.

Slots are poisoned between epochs and outputs start out poisoned, with guards round them; the order of threads
and blocks comes from the case.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscoder.testing import compare
from dscoder.testing.examples import FIXED
from dscoder.testing.poison import WILD, assert_guards_whole, guarded
from dscoder.testing.virtual_ranks import (
    Received,
    Sent,
    VirtualRanks,
    gathered,
    reference_routes,
    rows_of_sources,
    spread,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COPIES = ["words", "bulk"]
POISON = 0x7F  # in every byte: NaN in every float, wild as an index


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    num_ranks: int = 3
    max_tokens: int = 7
    width: int = 24
    num_topk: int = 4
    num_local_experts: int = 2
    dtype: torch.dtype = torch.float32
    copy: str = "words"
    is_together: bool = False  # sends and receives in one grid
    is_exact: bool = False
    num_blocks: int = 2
    order: int = 0

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.num_local_experts


def ranks_of(
    host_ops: ModuleType, host_kernels: ModuleType, case: Case, timeout: float = 600.0
) -> VirtualRanks:
    host_kernels.set_order(case.order)
    return VirtualRanks(
        host_ops,
        num_ranks=case.num_ranks,
        max_tokens=case.max_tokens,
        row_bytes=case.width * case.dtype.itemsize,
        num_topk=case.num_topk,
        timeout=timeout,
        copy=case.copy,
        num_blocks=case.num_blocks,
    )


def poison_slots(host_ops: ModuleType, ranks: VirtualRanks, case: Case) -> None:
    """Everything behind the control words, in every buffer: all of it has been read."""
    row_bytes = case.width * case.dtype.itemsize
    layout = host_ops.comm_buffer_layout(case.num_ranks, case.max_tokens, row_bytes, case.num_topk)
    begin = layout["dispatch_rows"]
    for buffer in ranks.buffers:
        ctypes.memset(buffer.address + begin, POISON, layout["num_bytes"] - begin)


def sent_of(ranks: VirtualRanks, case: Case, seed: int) -> Sent:
    """Uneven numbers of tokens, none on some ranks; choices dropped, or wild, or doubled."""
    rng = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(0, case.max_tokens + 1, (case.num_ranks,), generator=rng).tolist()
    num_tokens[int(torch.randint(0, case.num_ranks, (), generator=rng))] = seed % 2 * case.max_tokens
    outside = torch.tensor([-1, case.num_experts, WILD, -(2**31)], dtype=torch.int32)
    idx = []
    for count in num_tokens:
        shape = (count, case.num_topk)
        any_expert = torch.randint(0, case.num_experts, shape, generator=rng, dtype=torch.int32)
        wild = outside[torch.randint(0, 4, shape, generator=rng)]
        idx.append(torch.where(torch.rand(shape, generator=rng) < 0.4, wild, any_expert))
    x = [torch.randn(n, case.width, generator=rng).to(case.dtype) for n in num_tokens]
    weight = [torch.rand(n, case.num_topk, generator=rng) for n in num_tokens]
    slot, count_of = ranks.routes(idx, num_experts=case.num_experts)
    return Sent(x=x, idx=idx, weight=weight, slot=slot, count=count_of)


def begins_of(ranks: VirtualRanks, case: Case, count: Sequence[Tensor]) -> list[list[int]] | None:
    return [ranks.exact_begin(count, rank) for rank in range(case.num_ranks)] if case.is_exact else None


class Guarded:
    """Poisoned outputs by their shapes, whose guards are looked at together."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        view, memory = guarded(*shape, dtype=dtype)
        self.memories.append(memory)
        return view

    def check(self) -> None:
        assert_guards_whole(*self.memories)


def dispatch(host_ops: ModuleType, ranks: VirtualRanks, case: Case, sent: Sent) -> Received:
    begins, make = begins_of(ranks, case, sent.count), Guarded()
    num_rows = [(begins[rank] if begins else ranks.worst_begin())[-1] for rank in range(case.num_ranks)]
    received = Received(
        x=[make(n, case.width, dtype=case.dtype) for n in num_rows],
        count=[make(case.num_ranks, dtype=torch.int32) for _ in num_rows],
        idx=[make(n, case.num_topk, dtype=torch.int32) for n in num_rows],
        weight=[make(n, case.num_topk, dtype=torch.float32) for n in num_rows],
    )
    sends = (sent.x, sent.slot, sent.count, sent.idx, sent.weight)
    receives = (received.x, received.count, received.idx, received.weight, begins, case.num_local_experts)
    if case.is_together:
        host_ops.dispatch_together(ranks.buffers, sends, receives)
    else:
        host_ops.dispatch_send(ranks.buffers, *sends)
        host_ops.dispatch_receive(ranks.buffers, *receives)
    make.check()
    return received


def check_received(ranks: VirtualRanks, case: Case, sent: Sent, received: Received) -> None:
    begins = begins_of(ranks, case, sent.count)
    for rank in range(case.num_ranks):
        begin = begins[rank] if begins else ranks.worst_begin()
        counts = [int(count_R[rank]) for count_R in sent.count]
        assert received.count[rank].tolist() == counts
        x, idx, weight = (spread(values, sent.slot, rank) for values in (sent.x, sent.idx, sent.weight))
        is_used = torch.zeros(begin[-1], dtype=torch.bool)
        for source, rows in rows_of_sources(counts, begin):
            is_used[rows] = True
            compare.assert_same(received.x[rank][rows], x[source])
            local = idx[source] - rank * case.num_local_experts
            is_local = (idx[source] // case.num_local_experts == rank) & (idx[source] >= 0)
            compare.assert_same(received.idx[rank][rows], torch.where(is_local, local, -1))
            compare.assert_same(received.weight[rank][rows], weight[source])
        assert bool(received.x[rank][~is_used].isnan().all()), "an unused row was written"
        assert bool((received.idx[rank][~is_used] == -1).all())
        assert bool((received.weight[rank][~is_used] == 0).all())


def combine(
    host_ops: ModuleType,
    ranks: VirtualRanks,
    case: Case,
    sent: Sent,
    y: Sequence[Tensor],
    weight: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    make, begins = Guarded(), begins_of(ranks, case, sent.count)
    count = [torch.stack([count_R[rank] for count_R in sent.count]) for rank in range(case.num_ranks)]
    out = [make(len(x), case.width, dtype=case.dtype) for x in sent.x]
    out_weight = [make(len(x), case.num_topk, dtype=torch.float32) for x in sent.x]
    sends, receives = (y, count, weight, begins), (out, sent.slot, sent.count, out_weight)
    if case.is_together:
        host_ops.combine_together(ranks.buffers, sends, receives)
    else:
        host_ops.combine_send(ranks.buffers, *sends)
        host_ops.combine_receive(ranks.buffers, *receives)
    make.check()
    return out, out_weight


def check_combined(ranks: VirtualRanks, case: Case, sent: Sent, seed: int, host_ops: ModuleType) -> None:
    """Rows of results on every rank, NaN where no slot is in use."""
    rng = torch.Generator().manual_seed(seed)
    begins = begins_of(ranks, case, sent.count)
    y, weight = [], []
    for rank in range(case.num_ranks):
        begin = begins[rank] if begins else ranks.worst_begin()
        counts = [int(count_R[rank]) for count_R in sent.count]
        y.append(torch.full((begin[-1], case.width), torch.nan, dtype=case.dtype))
        weight.append(torch.full((begin[-1], case.num_topk), torch.nan))
        for _, rows in rows_of_sources(counts, begin):
            y[rank][rows] = torch.randn(y[rank][rows].shape, generator=rng).to(case.dtype)
            weight[rank][rows] = torch.randn(weight[rank][rows].shape, generator=rng)
    out, out_weight = combine(host_ops, ranks, case, sent, y, weight)
    for source in range(case.num_ranks):
        returned = [
            slice((begins[r] if begins else ranks.worst_begin())[source], None) for r in range(case.num_ranks)
        ]
        slot_TR = sent.slot[source]
        compare.assert_same(out[source], gathered([y[r][rows] for r, rows in enumerate(returned)], slot_TR))
        wanted = gathered([weight[r][rows] for r, rows in enumerate(returned)], slot_TR)
        compare.assert_same(out_weight[source], wanted)


def check(host_ops: ModuleType, host_kernels: ModuleType, case: Case, num_epochs: int = 1) -> None:
    ranks = ranks_of(host_ops, host_kernels, case)
    for epoch in range(num_epochs):
        seed = 1000 * case.order + epoch
        sent = sent_of(ranks, case, seed)
        for source, idx_TK in enumerate(sent.idx):
            slot_TR, count_R = reference_routes(
                idx_TK, num_experts=case.num_experts, num_ranks=case.num_ranks
            )
            compare.assert_same(sent.slot[source], slot_TR)
            compare.assert_same(sent.count[source], count_R)
        check_received(ranks, case, sent, dispatch(host_ops, ranks, case, sent))
        check_combined(ranks, case, sent, seed, host_ops)
        poison_slots(host_ops, ranks, case)
    assert ranks.status() == [None] * case.num_ranks


# ---- routes ----


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 1023, 1024, 1025, 3001])
@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_routes_of_any_number_of_tokens(
    host_ops: ModuleType, host_kernels: ModuleType, num_tokens: int, num_ranks: int
) -> None:
    host_kernels.set_order(num_tokens)
    rng = torch.Generator().manual_seed(num_tokens)
    idx_TK = torch.randint(-3, 19, (num_tokens, 5), generator=rng, dtype=torch.int32)
    make = Guarded()
    slot_TR, count_R = make(num_tokens, num_ranks, dtype=torch.int32), make(num_ranks, dtype=torch.int32)
    host_ops.expert_routes([idx_TK], [slot_TR], [count_R], 16)
    make.check()
    wanted_TR, wanted_R = reference_routes(idx_TK, num_experts=16, num_ranks=num_ranks)
    compare.assert_same(slot_TR, wanted_TR)
    compare.assert_same(count_R, wanted_R)


@pytest.mark.parametrize("num_topk", [0, 1, 4, 5, 16, 33])
def test_routes_of_any_number_of_choices(
    host_ops: ModuleType, host_kernels: ModuleType, num_topk: int
) -> None:
    host_kernels.set_order(num_topk)
    rng = torch.Generator().manual_seed(num_topk)
    idx_TK = torch.randint(0, 64, (37, num_topk), generator=rng, dtype=torch.int32)
    slot_TR, count_R = torch.empty(37, 8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    host_ops.expert_routes([idx_TK], [slot_TR], [count_R], 64)
    wanted_TR, wanted_R = reference_routes(idx_TK, num_experts=64, num_ranks=8)
    compare.assert_same(slot_TR, wanted_TR)
    compare.assert_same(count_R, wanted_R)


def test_tokens_keep_their_order_at_a_rank(host_ops: ModuleType) -> None:
    idx_TK = torch.tensor([[0, 3], [2, 3], [-1, 1], [9, 2]], dtype=torch.int32)
    slot_TR, count_R = torch.empty(4, 2, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    host_ops.expert_routes([idx_TK], [slot_TR], [count_R], 4)
    assert slot_TR.tolist() == [[0, 0], [-1, 1], [1, -1], [-1, 2]]
    assert count_R.tolist() == [2, 3]


# ---- dispatch and combine ----


CASES = st.builds(
    Case,
    num_ranks=st.integers(1, 8),
    max_tokens=st.integers(1, 9),
    width=st.sampled_from([8, 24, 136]),
    num_topk=st.integers(1, 16),
    num_local_experts=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    copy=st.sampled_from(COPIES),
    is_together=st.booleans(),
    is_exact=st.booleans(),
    num_blocks=st.integers(1, 3),
    order=st.integers(0, 10_000),
)


@settings(FIXED, max_examples=60)
@given(case=CASES)
def test_any_exchange(host_ops: ModuleType, host_kernels: ModuleType, case: Case) -> None:
    check(host_ops, host_kernels, case, num_epochs=2)


@pytest.mark.parametrize("is_together", [False, True])
@pytest.mark.parametrize("copy", COPIES)
def test_buffers_are_used_again(
    host_ops: ModuleType, host_kernels: ModuleType, copy: str, is_together: bool
) -> None:
    check(host_ops, host_kernels, Case(copy=copy, is_together=is_together, order=5), num_epochs=8)


# A warp of 16-byte words moves 4096 bytes at once; a chunk of a bulk copy is 2048, six of them a ring.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_bytes", [16, 2032, 2048, 2064, 4096, 4112, 10240, 12288 + 16])
@pytest.mark.parametrize("copy", COPIES)
def test_any_width(
    host_ops: ModuleType, host_kernels: ModuleType, copy: str, row_bytes: int, dtype: torch.dtype
) -> None:
    width = row_bytes // dtype.itemsize
    check(
        host_ops,
        host_kernels,
        Case(num_ranks=2, max_tokens=40, width=width, dtype=dtype, copy=copy, num_blocks=1, order=row_bytes),
    )


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("copy", COPIES)
def test_any_order_of_threads(host_ops: ModuleType, host_kernels: ModuleType, copy: str, order: int) -> None:
    case = Case(num_ranks=4, max_tokens=33, copy=copy, is_together=True, order=order, num_blocks=1)
    check(host_ops, host_kernels, case, num_epochs=2)


def test_a_grid_planned_by_the_launch(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    for is_together in (False, True):
        check(host_ops, host_kernels, Case(num_blocks=0, is_together=is_together, num_ranks=8))


def test_rows_narrower_than_the_buffer_was_made_for(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    case = Case(width=48, dtype=torch.float32)
    ranks = ranks_of(host_ops, host_kernels, case)
    narrow = replace(case, width=8, dtype=torch.bfloat16)
    for epoch in range(2):
        sent = sent_of(ranks, narrow, epoch)
        check_received(ranks, narrow, sent, dispatch(host_ops, ranks, narrow, sent))
        check_combined(ranks, narrow, sent, epoch, host_ops)


def test_ranks_are_launched_one_by_one_in_any_order(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    case = Case(num_ranks=4)
    ranks = ranks_of(host_ops, host_kernels, case)
    sent = sent_of(ranks, case, 1)
    x = [torch.full((28, case.width), torch.nan) for _ in range(4)]
    count = [torch.empty(4, dtype=torch.int32) for _ in range(4)]
    out = [torch.full_like(rows, torch.nan) for rows in sent.x]
    for r in (2, 0, 3, 1):
        host_ops.dispatch_send([ranks.buffers[r]], [sent.x[r]], [sent.slot[r]], [sent.count[r]])
    for r in (1, 2):
        host_ops.dispatch_receive([ranks.buffers[r]], [x[r]], [count[r]])
        host_ops.combine_send([ranks.buffers[r]], [x[r]], [count[r]])
    host_ops.dispatch_receive([ranks.buffers[r] for r in (3, 0)], [x[3], x[0]], [count[3], count[0]])
    host_ops.combine_send([ranks.buffers[r] for r in (0, 3)], [x[0], x[3]], [count[0], count[3]])
    for r in (3, 0, 1, 2):
        host_ops.combine_receive([ranks.buffers[r]], [out[r]], [sent.slot[r]], [sent.count[r]])
        num_ranks_T1 = (sent.slot[r] >= 0).sum(dim=1, keepdim=True)
        torch.testing.assert_close(out[r], sent.x[r] * num_ranks_T1)
    assert ranks.status() == [None] * 4


def test_counts_are_told_before_the_rows_are_taken(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    case = Case(is_exact=True)
    ranks = ranks_of(host_ops, host_kernels, case)
    for epoch in range(2):
        sent = sent_of(ranks, case, epoch)
        host_ops.dispatch_send(ranks.buffers, sent.x, sent.slot, sent.count)
        count = [torch.full((3,), 77, dtype=torch.int32) for _ in range(3)]
        for _ in range(2):  # taking nothing, it may be asked again
            host_ops.dispatch_counts(ranks.buffers, count)
        wanted = [[int(count_R[rank]) for count_R in sent.count] for rank in range(3)]
        assert [count_R.tolist() for count_R in count] == wanted
        begins = [ranks.exact_begin(sent.count, rank) for rank in range(3)]
        x = [torch.full((begin[-1], case.width), torch.nan) for begin in begins]
        host_ops.dispatch_receive(ranks.buffers, x, count, row_begin=begins)
        for rank in range(3):
            compare.assert_same(x[rank], torch.cat(spread(sent.x, sent.slot, rank)))


# ---- gradients: the same kernels the other way round ----


def spread_rows(
    host_ops: ModuleType, ranks: VirtualRanks, case: Case, sent: Sent, rows: Sequence[Tensor]
) -> list[Tensor]:
    """Without indices and floats, along routes that are known."""
    found = [torch.zeros(ranks.worst_begin()[-1], case.width, dtype=case.dtype) for _ in rows]
    count = [torch.empty(case.num_ranks, dtype=torch.int32) for _ in rows]
    host_ops.dispatch_send(ranks.buffers, rows, sent.slot, sent.count)
    host_ops.dispatch_receive(ranks.buffers, found, count)
    return found


@pytest.mark.parametrize("copy", COPIES)
def test_spread_and_gather_are_each_others_gradient(
    host_ops: ModuleType, host_kernels: ModuleType, copy: str
) -> None:
    case = Case(num_ranks=4, max_tokens=9, copy=copy)
    ranks = ranks_of(host_ops, host_kernels, case)
    for seed in range(3):
        sent = sent_of(ranks, case, seed)
        rng = torch.Generator().manual_seed(seed)
        whole = [torch.randint(-4, 5, x.shape, generator=rng).float() for x in sent.x]  # sums are exact
        back = [torch.randint(-4, 5, (36, case.width), generator=rng).float() for _ in sent.x]
        there = spread_rows(host_ops, ranks, case, sent, whole)
        out, _ = combine(host_ops, ranks, case, sent, back, [torch.zeros(36, case.num_topk) for _ in back])
        along_slots = sum((a * b).sum() for a, b in zip(there, back, strict=True))
        along_tokens = sum((a * b).sum() for a, b in zip(whole, out, strict=True))
        assert float(along_slots) == float(along_tokens)
