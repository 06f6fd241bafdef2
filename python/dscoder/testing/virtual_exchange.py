"""Whole exchanges between ranks that share one device, launched in three ways, and what they must give.

"launches": each step of all ranks in one launch. "one_grid": sends and receives of all ranks in one
cooperative grid, truly side by side. "streams": a launch a rank and step, each rank's on a stream of its own.
The same functions run on a GPU and, on the CPU, on the host executor, which has no streams: there all send
before the first receives.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dscoder.testing.compare import assert_same
from dscoder.testing.poison import WILD
from dscoder.testing.virtual_ranks import Received, Sent, VirtualRanks, gathered, rows_of_sources, spread

HOW = ("launches", "one_grid", "streams")
POISON = 0x7F  # in every byte: NaN in every float, wild as an index


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeCase:
    """An expert layer's exchange."""

    num_ranks: int = 3
    max_tokens: int = 9
    width: int = 24
    num_topk: int = 4
    num_local_experts: int = 2
    dtype: torch.dtype = torch.bfloat16
    is_exact: bool = False
    how: str = "launches"
    copy: str = "auto"
    timeout: float = 20.0

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return self.num_ranks * self.num_local_experts

    def ranks(self, native: ModuleType) -> VirtualRanks:
        """Connected buffers."""
        return VirtualRanks(
            native,
            num_ranks=self.num_ranks,
            max_tokens=self.max_tokens,
            row_bytes=self.width * self.dtype.itemsize,
            num_topk=self.num_topk,
            timeout=self.timeout,
            copy=self.copy,
        )


class Exchange:
    """Dispatch and combine of a case's ranks, on the device of the tensors that come in."""

    def __init__(self, ranks: VirtualRanks, case: ExchangeCase) -> None:
        self.ranks, self.case = ranks, case
        self._streams: list[torch.cuda.Stream] = []

    def begins(self, count: Sequence[Tensor]) -> list[list[int]]:
        """Where sources' rows begin at each rank; reads the counts where the case is exact."""
        ranks = range(self.case.num_ranks)
        if not self.case.is_exact:
            return [self.ranks.worst_begin() for _ in ranks]
        return [self.ranks.exact_begin(count, rank) for rank in ranks]

    def dispatch(self, sent: Sent, begins: Sequence[Sequence[int]]) -> Received:
        """Everything that came to every rank."""
        case, num_rows = self.case, [begin[-1] for begin in begins]
        first = sent.x[0]
        received = Received(
            x=[first.new_empty(n, case.width) for n in num_rows],
            count=[sent.count[0].new_empty(case.num_ranks) for _ in num_rows],
            idx=[sent.idx[0].new_empty(n, case.num_topk) for n in num_rows],
            weight=[sent.weight[0].new_empty(n, case.num_topk) for n in num_rows],
        )
        sends = (sent.x, sent.slot, sent.count, sent.idx, sent.weight)
        receives = (received.x, received.count, received.idx, received.weight, begins)
        self.launch("dispatch", sends, receives, (case.num_local_experts,))
        return received

    def combine(
        self,
        sent: Sent,
        received: Received,
        y: Sequence[Tensor],
        weight: Sequence[Tensor],
        begins: Sequence[Sequence[int]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sums of the rows y, and of the floats beside them, for every token."""
        out = [torch.empty_like(x_TD) for x_TD in sent.x]
        out_weight = [torch.empty_like(weight_TK) for weight_TK in sent.weight]
        sends = (y, received.count, weight, begins)
        self.launch("combine", sends, (out, sent.slot, sent.count, out_weight), ())
        return out, out_weight

    def launch(
        self, way: str, sends: tuple[Any, ...], receives: tuple[Any, ...], common: tuple[Any, ...]
    ) -> None:
        """Sends and receives of all ranks as the bindings take them: lists by rank, then what is common."""
        native, buffers = self.ranks.native, self.ranks.buffers
        send, receive = getattr(native, f"{way}_send"), getattr(native, f"{way}_receive")
        if self.case.how == "one_grid":
            getattr(native, f"{way}_together")(buffers, sends, (*receives, *common))
        elif self.case.how == "launches":
            send(buffers, *sends)
            receive(buffers, *receives, *common)
        else:
            self._launch_apart(
                [_one(send, buffers, sends, (), rank) for rank in range(len(buffers))],
                [_one(receive, buffers, receives, common, rank) for rank in range(len(buffers))],
                is_on_gpu=sends[0][0].is_cuda,
            )

    def _launch_apart(
        self, sends: list[Callable[[], None]], receives: list[Callable[[], None]], *, is_on_gpu: bool
    ) -> None:
        if not is_on_gpu:
            for call in (*sends, *receives):
                call()
            return
        while len(self._streams) < len(sends):
            self._streams.append(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        caller = torch.cuda.current_stream()
        for stream, send, receive in zip(self._streams, sends, receives, strict=True):
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                send()
                receive()
        for stream in self._streams:
            caller.wait_stream(stream)


def _one(
    launch: Callable[..., None],
    buffers: Sequence[Any],
    lists: tuple[Any, ...],
    common: tuple[Any, ...],
    rank: int,
) -> Callable[[], None]:
    own = [None if values is None else [values[rank]] for values in lists]
    return lambda: launch([buffers[rank]], *own, *common)


# ---- what is sent ----


def draw(ranks: VirtualRanks, case: ExchangeCase, seed: int, device: str) -> Sent:
    """Uneven numbers of tokens, none on some ranks; choices dropped, or wild, or doubled."""
    rng = torch.Generator().manual_seed(seed)
    num_tokens = torch.randint(0, case.max_tokens + 1, (case.num_ranks,), generator=rng).tolist()
    num_tokens[seed % case.num_ranks] = seed // case.num_ranks % 2 * case.max_tokens
    outside = torch.tensor([-1, case.num_experts, WILD, -(2**31)], dtype=torch.int32)
    idx = []
    for count in num_tokens:
        shape = (count, case.num_topk)
        any_expert = torch.randint(0, case.num_experts, shape, generator=rng, dtype=torch.int32)
        wild = outside[torch.randint(0, 4, shape, generator=rng)]
        idx.append(torch.where(torch.rand(shape, generator=rng) < 0.4, wild, any_expert).to(device))
    x = [torch.randn(n, case.width, generator=rng).to(device, case.dtype) for n in num_tokens]
    weight = [torch.rand(n, case.num_topk, generator=rng).to(device) for n in num_tokens]
    slot, count_of = ranks.routes(idx, num_experts=case.num_experts)
    return Sent(x=x, idx=idx, weight=weight, slot=slot, count=count_of)


def results(received: Received) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and floats for the way back: what came, changed by each rank in its own way."""
    y = [x * (rank + 1) for rank, x in enumerate(received.x)]
    weight = [weight_SK + rank for rank, weight_SK in enumerate(received.weight)]
    return y, weight


# ---- what must come ----


def check_received(
    case: ExchangeCase, sent: Sent, received: Received, begins: Sequence[Sequence[int]]
) -> None:
    """Every token once at each rank of its experts, in order; no map names a row that nothing came for."""
    for rank, begin in enumerate(begins):
        counts = [int(count_R[rank]) for count_R in sent.count]
        assert received.count[rank].tolist() == counts
        x, idx, weight = (spread(values, sent.slot, rank) for values in (sent.x, sent.idx, sent.weight))
        is_used = torch.zeros(begin[-1], dtype=torch.bool, device=received.x[rank].device)
        for source, rows in rows_of_sources(counts, begin):
            is_used[rows] = True
            assert_same(received.x[rank][rows], x[source])
            local = idx[source] - rank * case.num_local_experts
            is_local = (idx[source] // case.num_local_experts == rank) & (idx[source] >= 0)
            assert_same(received.idx[rank][rows], torch.where(is_local, local, -1))
            assert_same(received.weight[rank][rows], weight[source])
        assert bool((received.idx[rank][~is_used] == -1).all())
        assert bool((received.weight[rank][~is_used] == 0).all())


def check_summed(
    sent: Sent,
    sums: tuple[list[Tensor], list[Tensor]],
    y: Sequence[Tensor],
    weight: Sequence[Tensor],
    begins: Sequence[Sequence[int]],
) -> None:
    """The bits of sums in float32 in the order of the ranks."""
    for source, slot_TR in enumerate(sent.slot):
        for values, summed in zip((y, weight), sums, strict=True):
            rows = [values[rank][begin[source] :] for rank, begin in enumerate(begins)]
            assert_same(summed[source], gathered(rows, slot_TR))


def poison_slots(ranks: VirtualRanks, case: ExchangeCase, device: str) -> None:
    """Everything behind the control words, in every buffer: all of it has been read."""
    row_bytes = case.width * case.dtype.itemsize
    layout = ranks.native.comm_buffer_layout(case.num_ranks, case.max_tokens, row_bytes, case.num_topk)
    begin, end = layout["dispatch_rows"], layout["num_bytes"]
    for buffer in ranks.buffers:
        if device == "cpu":
            ctypes.memset(buffer.address + begin, POISON, end - begin)
        else:
            torch.as_tensor(_Memory(buffer.address + begin, end - begin), device=device).fill_(POISON)


class _Memory:
    """Bytes of a GPU that torch did not allocate, for torch to write."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            **{"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        }


# ---- checks ----


def check_epochs(native: ModuleType, case: ExchangeCase, device: str, *, num_epochs: int = 3) -> None:
    """Exchange after exchange over the same slots, poisoned in between, as a reference computes them."""
    ranks = case.ranks(native)
    exchange = Exchange(ranks, case)
    for epoch in range(num_epochs):
        sent = draw(ranks, case, epoch + case.num_ranks, device)
        begins = exchange.begins(sent.count)
        received = exchange.dispatch(sent, begins)
        check_received(case, sent, received, begins)
        y, weight = results(received)
        check_summed(sent, exchange.combine(sent, received, y, weight, begins), y, weight, begins)
        poison_slots(ranks, case, device)
    assert ranks.status() == [None] * case.num_ranks


def check_repeats(native: ModuleType, case: ExchangeCase, device: str, *, num_epochs: int = 6) -> None:
    """Many dispatches in a row, nothing in between: slots are waited for."""
    ranks = case.ranks(native)
    exchange = Exchange(ranks, case)
    sent = draw(ranks, case, case.num_ranks, device)
    begins = exchange.begins(sent.count)
    all_received = [exchange.dispatch(sent, begins) for _ in range(num_epochs)]
    for received in all_received:
        check_received(case, sent, received, begins)


def check_absence(native: ModuleType, case: ExchangeCase, device: str, *, missing: int) -> None:
    """A rank that never sends is named by all others, whose outputs are NaN; nothing after it hangs."""
    ranks = case.ranks(native)
    sent = draw(ranks, case, 2 * case.num_ranks, device)
    others = [rank for rank in range(case.num_ranks) if rank != missing]
    num_rows = case.num_ranks * case.max_tokens
    for _ in range(2):
        rows = [sent.x[0].new_zeros(num_rows, case.width) for _ in others]
        counts = [sent.count[0].new_full((case.num_ranks,), 77) for _ in others]
        buffers = [ranks.buffers[rank] for rank in others]
        lists = (sent.x, sent.slot, sent.count)
        native.dispatch_send(buffers, *([values[rank] for rank in others] for values in lists))
        native.dispatch_receive(buffers, rows, counts, num_local_experts=case.num_local_experts)
        for x, count in zip(rows, counts, strict=True):
            assert bool(x.isnan().all())
            assert count.tolist() == [0] * case.num_ranks
    wanted = {"peer": missing, "phase": "dispatch_arrival", "expected": 1, "seen": 0}
    for rank in others:
        assert ranks.status()[rank] == {"rank": rank, **wanted}
    assert ranks.status()[missing] is None
