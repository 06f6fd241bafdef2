"""What moves rows between the ranks of an expert-parallel group: the interface of its transports.

Two movements. *Spread*: a token's row goes once to each rank that holds one of its experts (dispatch, and the
gradient of combine). *Gather*: those rows come back and are summed at the token (combine, and the gradient of
dispatch). Both start without waiting, so that other work runs while rows travel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

DISPATCH, COMBINE = "dispatch", "combine"  # the two movements, by the op that uses them forward


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeSizes:
    """The sizes of an exchange, the same on every rank but for `rank`."""

    rank: int
    num_ranks: int
    num_experts: int
    hidden: int  # width of a row
    max_tokens: int  # of a rank, the most in one dispatch
    num_topk: int
    dtype: torch.dtype
    exact: bool

    @property
    def num_local_experts(self) -> int:
        """Experts of a rank; rank r holds those from r times this number on."""
        return self.num_experts // self.num_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """Where the tokens of one dispatch go, on the device."""

    slot_TR: Tensor  # int32, token's place among those this rank sends to rank R; -1: it does not go there
    counts_R: Tensor  # int32, tokens sent to each rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What travels with a token's row: its experts and their weights."""

    idx_TK: Tensor  # int32, of all experts; outside of them: dropped
    weight_TK: Tensor  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Rows that arrived, one a slot. With choices: theirs, else None."""

    x_SD: Tensor  # anything in slots that no token has
    idx_SK: Tensor | None  # int32, local expert; -1: dropped, another rank's, or no token in this slot
    weight_SK: Tensor | None  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Sums at the tokens over the ranks they went to."""

    out_TD: Tensor | None
    weight_TK: Tensor | None  # of the weights' gradients, where those were sent


class Transport(Protocol):
    """One way to move rows. All ranks of the group call it in the same order."""

    @property
    def name(self) -> str:
        """As in `ExchangeOptions.transport`."""

    def route(self, idx_TK: Tensor) -> Routes:
        """The routes of tokens with these experts; the host reads of them in the exact path alone."""

    def start_spread(self, routes: Routes, x_TD: Tensor, choices: Choices | None) -> Callable[[], Spread]:
        """Sends tokens' rows; what is returned waits for those of the other ranks."""

    def start_gather(
        self, routes: Routes, y_SD: Tensor | None, weight_SK: Tensor | None
    ) -> Callable[[], Gathered]:
        """Sends slots' rows (and K floats each) back; what is returned waits for them and sums in float32."""

    def check(self) -> None:
        """ExchangeError if an exchange is known to have failed."""

    def close(self) -> None:
        """Gives buffers and connections back; every rank calls it."""


def find_slots(idx_TK: Tensor, *, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """(slot_TR, counts_R) of `Routes`: slots of a pair of ranks in the order of the tokens."""
    num_local = num_experts // num_ranks
    is_kept_TK = (idx_TK >= 0) & (idx_TK < num_experts)
    rank_TK = (idx_TK // num_local).masked_fill(~is_kept_TK, num_ranks)
    # One more column takes what was dropped.
    is_sent = torch.zeros(idx_TK.shape[0], num_ranks + 1, dtype=torch.int32, device=idx_TK.device)
    is_sent_TR = is_sent.scatter_(1, rank_TK.long(), 1)[:, :num_ranks]
    slot_TR = is_sent_TR.cumsum(0, dtype=torch.int32) - 1
    return slot_TR.masked_fill_(is_sent_TR == 0, -1), is_sent_TR.sum(0, dtype=torch.int32)
