"""The transport over torch.distributed: all_to_all_single on gloo (CPU) or NCCL (GPUs, between nodes too).

Exact: the ranks tell each other how many tokens come, the host reads it, and just those rows travel. Worst
case: each pair of ranks exchanges `max_tokens` rows whatever the tokens chose, so the host waits for nothing
and the sizes never change, and the wire carries num_ranks * max_tokens rows a rank, padding included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dscoder.ops.exchange_transport import (
    Choices,
    ExchangeSizes,
    Gathered,
    Routes,
    Spread,
    find_slots,
)
from dscoder.ops.library import INT32_MAX
from dscoder.ops.moe_permute import gather_rows
from dscoder.ops.roll_call import ExchangeError, RollCall


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveRoutes(Routes):
    """Routes, and how the rows lie in the buffers that travel: by rank, then by token."""

    row_TK: Tensor  # int32, a token's rows of the send buffer in the order of the ranks; -1: no further one
    token_N: Tensor  # int32, token of each row of the send buffer; -1: padding
    num_sent: tuple[int, ...]  # rows to each rank
    num_received: tuple[int, ...]  # rows from each rank


class CollectiveTransport:
    """Rows as equal or exact splits of all_to_all_single."""

    name = "collective"

    def __init__(
        self, process_group: ProcessGroup, sizes: ExchangeSizes, *, roll_call: RollCall, timeout: float
    ) -> None:
        self._group = process_group
        self._sizes = sizes
        self._roll_call = roll_call
        self._timeout = timeout
        self._failure: ExchangeError | None = None

    def route(self, idx_TK: Tensor) -> CollectiveRoutes:
        """Routes of these tokens."""
        sizes = self._sizes
        slot_TR, counts_R = find_slots(idx_TK, num_experts=sizes.num_experts, num_ranks=sizes.num_ranks)
        if sizes.exact:
            num_sent, num_received = self._exchange_counts(counts_R)
            base_R = counts_R.cumsum(0, dtype=torch.int32) - counts_R
        else:
            num_sent = num_received = (sizes.max_tokens,) * sizes.num_ranks
            base_R = sizes.max_tokens * torch.arange(sizes.num_ranks, dtype=torch.int32, device=idx_TK.device)
        row_TR = (slot_TR + base_R).masked_fill_(slot_TR < 0, -1)
        return CollectiveRoutes(
            slot_TR=slot_TR,
            counts_R=counts_R,
            row_TK=_rows_of_tokens(row_TR, num_topk=sizes.num_topk),
            token_N=_tokens_of_rows(row_TR, num_rows=sum(num_sent)),
            num_sent=num_sent,
            num_received=num_received,
        )

    def start_spread(self, routes: Routes, x_TD: Tensor, choices: Choices | None) -> Callable[[], Spread]:
        """One collective for the rows and one for the choices."""
        own = _own(routes)
        rows = x_TD.index_select(0, own.token_N) if self._sizes.exact else gather_rows(x_TD, own.token_N)
        land_rows = self._exchange(rows, own.num_sent, own.num_received)
        if choices is None:
            return lambda: Spread(x_SD=land_rows(), idx_SK=None, weight_SK=None)
        words = _words(choices)[own.token_N.long()]  # -1 is the last row, which has no choices
        land_words = self._exchange(words, own.num_sent, own.num_received)

        def land() -> Spread:
            idx_SK, weight_SK = self._read_words(land_words())
            return Spread(x_SD=land_rows(), idx_SK=idx_SK, weight_SK=weight_SK)

        return land

    def start_gather(
        self, routes: Routes, y_SD: Tensor | None, weight_SK: Tensor | None
    ) -> Callable[[], Gathered]:
        """One collective for the rows and one for the weights' gradients, of what there is."""
        own = _own(routes)
        # What was received goes back, so the splits change places.
        back = [
            None if rows is None else self._exchange(rows, own.num_received, own.num_sent)
            for rows in (y_SD, weight_SK)
        ]

        def land() -> Gathered:
            out_TD, weight_TK = (
                None if arrive is None else _sum_in_order(gather_rows(arrive(), own.row_TK))  # -1 reads zeros
                for arrive in back
            )
            return Gathered(out_TD=out_TD, weight_TK=weight_TK)

        return land

    def check(self) -> None:
        """The failure of an earlier exchange again, if there was one."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Nothing is held: the process group is the caller's."""

    def _exchange_counts(self, counts_R: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = self._sizes
        ones = (1,) * sizes.num_ranks
        received = self._exchange(counts_R[:, None], ones, ones)()
        sent_received = torch.stack((counts_R, received[:, 0])).tolist()  # the host waits here
        return tuple(sent_received[0]), tuple(sent_received[1])

    def _read_words(self, words: Tensor) -> tuple[Tensor, Tensor]:
        num_topk, num_local = self._sizes.num_topk, self._sizes.num_local_experts
        weight_SK = words[:, :num_topk].contiguous().view(torch.float32)
        idx_SK = words[:, num_topk:] - self._sizes.rank * num_local
        return idx_SK.masked_fill_((idx_SK < 0) | (idx_SK >= num_local), -1), weight_SK

    def _exchange(
        self, rows: Tensor, num_sent: Sequence[int], num_received: Sequence[int]
    ) -> Callable[[], Tensor]:
        """Starts one all-to-all of whole rows; what is returned waits for it."""
        self.check()
        rows = rows.detach().contiguous()
        received = rows.new_empty(sum(num_received), rows.shape[1])
        try:
            # As bytes: a backend need not know the dtype.
            work = dist.all_to_all_single(
                *(received.view(torch.uint8), rows.view(torch.uint8)),
                *(list(num_received), list(num_sent)),
                group=self._group,
                async_op=True,
            )
        except RuntimeError as error:
            raise self._fail("start an exchange", error) from error

        def land() -> Tensor:
            try:
                if rows.is_cuda:
                    work.wait()  # the stream waits; with a timeout NCCL would stop the host
                else:
                    work.wait(timedelta(seconds=self._timeout))
            except RuntimeError as error:
                raise self._fail(f"end an exchange within {self._timeout:g} s", error) from error
            return received

        return land

    def _fail(self, doing: str, error: RuntimeError) -> ExchangeError:
        self._failure = self._roll_call.failure(doing, error)
        return self._failure


def _own(routes: Routes) -> CollectiveRoutes:
    assert isinstance(routes, CollectiveRoutes), "routes of another transport"
    return routes


def _rows_of_tokens(row_TR: Tensor, *, num_topk: int) -> Tensor:
    """A token's rows, -1 behind them, in no more columns than it may have ranks: one for each choice."""
    if row_TR.shape[1] <= num_topk:
        return row_TR
    row_TK = row_TR.masked_fill(row_TR < 0, INT32_MAX).sort(dim=1).values[:, :num_topk]
    return row_TK.masked_fill_(row_TK == INT32_MAX, -1)


def _sum_in_order(rows_TKD: Tensor) -> Tensor:
    """One column after the other, at least in float32, rounded once; sum() has an order of its own."""
    total_TD = rows_TKD[:, 0].to(torch.promote_types(rows_TKD.dtype, torch.float32), copy=True)
    for column in range(1, rows_TKD.shape[1]):
        total_TD += rows_TKD[:, column]
    return total_TD.to(rows_TKD.dtype)


def _tokens_of_rows(row_TR: Tensor, *, num_rows: int) -> Tensor:
    """The inverse of row_TR: the token of each row, -1 where a row has none."""
    num_tokens, num_ranks = row_TR.shape
    token_N = row_TR.new_full((num_rows + 1,), -1)  # the last takes the tokens that have no row
    token_TR = torch.arange(num_tokens, dtype=torch.int32, device=row_TR.device)[:, None]
    row = row_TR.masked_fill(row_TR < 0, num_rows).long()
    token_N.scatter_(0, row.flatten(), token_TR.expand(num_tokens, num_ranks).flatten())
    return token_N[:num_rows]


def _words(choices: Choices) -> Tensor:
    """int32 [T + 1, 2 K]: weights (their bits), then experts; the last row has no expert."""
    num_tokens, num_topk = choices.idx_TK.shape
    words = choices.idx_TK.new_zeros(num_tokens + 1, 2 * num_topk)
    words[:num_tokens, :num_topk] = choices.weight_TK.detach().contiguous().view(torch.int32)
    words[:num_tokens, num_topk:] = choices.idx_TK
    words[num_tokens, num_topk:] = -1
    return words
