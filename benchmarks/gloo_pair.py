"""Two processes that exchange tokens over gloo: the first, which is timed, tells the second what is next."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shapes import LAYERS
from dscoder import ops
from dscoder.testing import cases
from dscoder.testing.ranks import free_port

NUM_RANKS, NUM_TOKENS = 2, 512
MODEL = "v2_lite"
STOP = -1
LIMIT = timedelta(seconds=60)


class Rank:
    """A rank's tokens, and what it can do together with the other; `actions` is in the same order on both."""

    def __init__(self, rank: int, port: int) -> None:
        layer = LAYERS[MODEL]
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_RANKS, timeout=LIMIT
        )
        group = dist.group.WORLD
        assert group is not None, "the default group was just made"
        self.exchange = ops.ExpertParallel(
            group,
            num_experts=layer.num_experts,
            hidden=layer.width,
            max_tokens=NUM_TOKENS,
            num_topk=layer.num_topk,
            dtype=torch.float32,
        )
        rng = cases.generator(f"gloo {rank}")
        sizes = {"num_experts": layer.num_experts, "num_topk": layer.num_topk}
        self.idx_TK = cases.routing(rng, num_tokens=NUM_TOKENS, **sizes)
        self.x_TD = cases.randn(rng, NUM_TOKENS, layer.width)
        self.weight_TK = torch.rand(NUM_TOKENS, layer.num_topk, generator=rng)
        self.y_SD, self.handle = self.exchange.start_dispatch(self.x_TD, self.idx_TK, self.weight_TK).wait()
        self.columns = [column.nonzero().flatten() for column in (self.handle.slot_TR >= 0).T]
        self.sent = self.handle.counts_R.tolist()
        received = torch.empty_like(self.handle.counts_R)
        dist.all_to_all_single(received, self.handle.counts_R)
        self.received = received.tolist()
        self.actions: dict[str, Callable[[], Any]] = {
            "dispatch": self.dispatch,
            "dispatch by torch": self.dispatch_by_torch,
            "combine": self.combine,
            "combine by torch": self.combine_by_torch,
        }

    def dispatch(self) -> Tensor:
        """Rows, indices and weights, after counts."""
        return self.exchange.start_dispatch(self.x_TD, self.idx_TK, self.weight_TK).wait()[0]

    def dispatch_by_torch(self) -> Tensor:
        """The rows alone, where the ranks know how many come."""
        rows = self.x_TD.index_select(0, torch.cat(self.columns))
        arrived = rows.new_empty(sum(self.received), rows.shape[1])
        dist.all_to_all_single(arrived, rows, self.received, self.sent)
        return arrived

    def combine(self) -> Tensor:
        """Sums of the rows that come back."""
        return self.exchange.start_combine(self.y_SD, self.handle).wait()

    def combine_by_torch(self) -> Tensor:
        """The same by index_add."""
        back = self.y_SD.new_empty(sum(self.sent), self.y_SD.shape[1])
        dist.all_to_all_single(back, self.y_SD, self.sent, self.received)
        return torch.zeros_like(self.x_TD).index_add_(0, torch.cat(self.columns), back)

    def do(self, name: str) -> Any:
        """On both ranks; the first decides."""
        dist.broadcast(torch.tensor([list(self.actions).index(name)]), 0)
        return self.actions[name]()


def follow(port: int) -> None:
    """The second rank, until it is told to stop."""
    torch.set_num_threads(1)
    rank, told = Rank(1, port), torch.empty(1, dtype=torch.int64)
    while True:
        dist.broadcast(told, 0)
        if told.item() == STOP:
            dist.destroy_process_group()
            return
        list(rank.actions.values())[int(told)]()


@contextmanager
def first_of_two() -> Iterator[Rank]:
    """This process as rank 0, beside one that follows."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=follow, args=(port,), daemon=True)
    process.start()
    try:
        yield Rank(0, port)
        dist.broadcast(torch.tensor([STOP]), 0)
        process.join(LIMIT.total_seconds())
    finally:
        process.kill()
        process.join()
        dist.destroy_process_group()
