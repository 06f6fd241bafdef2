"""Several ranks of an exchange in one process, on the kernels of csrc/comm, and what they must compute.

The ranks share one device: the host executor's (`native` is then its module, tensors on the CPU) or a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "Received",
    "Sent",
    "VirtualRanks",
    "gathered",
    "reference_routes",
    "rows_of_sources",
    "spread",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What every rank sends, a list entry each: tokens, their experts and weights, their routes."""

    x: list[Tensor]  # [T, D]
    idx: list[Tensor]  # [T, K]
    weight: list[Tensor]  # [T, K]
    slot: list[Tensor]  # [T, R]
    count: list[Tensor]  # [R]


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """What came to every rank: rows by source and position, local experts, weights, numbers by source."""

    x: list[Tensor]  # [S, D]
    count: list[Tensor]  # [R]
    idx: list[Tensor]  # [S, K]
    weight: list[Tensor]  # [S, K]


def reference_routes(idx_TK: Tensor, *, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """`slot_TR` (position among the tokens that go to the rank, -1 none) and `count_R`, int32."""
    is_expert = (idx_TK >= 0) & (idx_TK < num_experts)
    rank_TK = torch.where(is_expert, idx_TK, 0).long() // (num_experts // num_ranks)
    goes_TR = torch.zeros(idx_TK.shape[0], num_ranks, dtype=torch.bool, device=idx_TK.device)
    for rank in range(num_ranks):
        goes_TR[:, rank] = (is_expert & (rank_TK == rank)).any(dim=1)
    position_TR = goes_TR.cumsum(dim=0) - 1
    slot_TR = torch.where(goes_TR, position_TR, -1).to(torch.int32)
    return slot_TR, goes_TR.sum(dim=0).to(torch.int32)


def rows_of_sources(counts: Sequence[int], row_begin: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(source, its used rows), where each source's rows begin at row_begin."""
    for source, count in enumerate(counts):
        yield source, slice(row_begin[source], row_begin[source] + count)


def spread(values: Sequence[Tensor], slot: Sequence[Tensor], rank: int) -> list[Tensor]:
    """From each source the rows that go to `rank`, in the order of their slots."""
    found = []
    for value, slot_TR in zip(values, slot, strict=True):
        goes_T = slot_TR[:, rank] >= 0
        position_N = slot_TR[goes_T, rank].long()
        rows = torch.empty_like(value[goes_T])
        rows[position_N] = value[goes_T]
        found.append(rows)
    return found


def gathered(returned: Sequence[Tensor], slot_TR: Tensor) -> Tensor:
    """The sum over ranks, in rank order, in float32, rounded once; `returned[r]`: rows that came from r."""
    sum_TD = torch.zeros(slot_TR.shape[0], returned[0].shape[1], device=slot_TR.device)
    for rank, rows in enumerate(returned):
        goes_T = slot_TR[:, rank] >= 0
        sum_TD[goes_T] += rows[slot_TR[goes_T, rank].long()].float()
    return sum_TD.to(returned[0].dtype)


class VirtualRanks:
    """The buffers of `num_ranks` ranks, connected, and the launches for all of them at once."""

    def __init__(
        self,
        native: ModuleType,
        *,
        num_ranks: int,
        max_tokens: int,
        row_bytes: int,
        num_topk: int,
        timeout: float = 600.0,
        copy: str = "auto",
        num_blocks: int = 0,
    ) -> None:
        """Allocate and connect; `copy` and `num_blocks` as CommBuffer has them."""
        self.native = native
        self.num_ranks, self.max_tokens, self.num_topk = num_ranks, max_tokens, num_topk
        self.buffers = [
            native.CommBuffer(
                rank=rank,
                num_ranks=num_ranks,
                max_tokens=max_tokens,
                row_bytes=row_bytes,
                num_topk=num_topk,
                timeout=timeout,
                copy=copy,
                num_blocks=num_blocks,
            )
            for rank in range(num_ranks)
        ]
        for buffer in self.buffers:
            for peer in self.buffers:
                if peer is not buffer:
                    buffer.connect(peer)

    def routes(self, idx: Sequence[Tensor], *, num_experts: int) -> tuple[list[Tensor], list[Tensor]]:
        """`slot` and `count` of every rank, by the kernel."""
        slot = [idx_TK.new_full((idx_TK.shape[0], self.num_ranks), 77) for idx_TK in idx]
        count = [idx_TK.new_full((self.num_ranks,), 77) for idx_TK in idx]
        self.native.expert_routes(idx, slot, count, num_experts)
        return slot, count

    def worst_begin(self) -> list[int]:
        """Where sources' rows begin in the worst-case layout, and the number of rows."""
        return [source * self.max_tokens for source in range(self.num_ranks + 1)]

    def exact_begin(self, count: Sequence[Tensor], rank: int) -> list[int]:
        """The same for the compact layout of `rank`: what each source sends it, added up."""
        begins = [0]
        for count_R in count:
            begins.append(begins[-1] + int(count_R[rank]))
        return begins

    def status(self) -> list[dict[str, int | str] | None]:
        """What each rank has recorded of a wait that ended."""
        return [buffer.status() for buffer in self.buffers]
