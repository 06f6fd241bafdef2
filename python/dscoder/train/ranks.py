"""The ranks of a run: how they are laid out, and what they add up and tell each other with every step."""

import signal
import socket
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from dscoder.runtime.agreement import Agreement
from dscoder.runtime.mesh import Mesh

Count = int | Tensor  # a tensor where reading it would be a wait for the device

ALONE = {"replicate": 1, "expert_shard": 1, "expert": 1}  # the layout of one process


class Note(IntEnum):
    """What a rank lets all others know with the figures of a step."""

    INTERRUPTED = 0
    TERMINATED = 1
    UNSAVED = 2  # a checkpoint could not be written


STOPS = {signal.SIGINT: Note.INTERRUPTED, signal.SIGTERM: Note.TERMINATED}


class Ranks(Agreement):
    """The ranks of a run, how they are laid out, and the sums and notes of each step."""

    def __init__(self, mesh: Mesh | None = None, *, sums_each_batch: bool = False) -> None:
        """`mesh`: None for one process without torchrun. `sums_each_batch`: as in ParallelConfig."""
        super().__init__(None if mesh is None else mesh.control)
        self.mesh = mesh
        self.sums_each_batch = sums_each_batch
        self.background = Agreement(None if mesh is None else mesh.background)  # for one other thread
        self.forget()

    def layout(self) -> dict[str, int]:
        """How many ranks there are along each dimension."""
        if self.mesh is None:
            return dict(ALONE)
        mesh = self.mesh
        return {"replicate": mesh.replicate, "expert_shard": mesh.expert_shard, "expert": mesh.expert}

    def num_neighbours(self) -> int:
        """How many of the ranks share this machine's cores, this one among them."""
        return self.gather(socket.gethostname()).count(socket.gethostname())

    def totals(self, *counts: int) -> Sequence[Count]:
        """Each count summed over all ranks, at least 1; of many ranks on the device, without a wait."""
        if self.mesh is None:
            return [max(1, count) for count in counts]
        sums_N = torch.tensor(counts, dtype=torch.int64).to(self.mesh.device, non_blocking=True)
        return list(self.mesh.all_sum(sums_N).clamp(min=1).unbind())

    def add_up(self, figures_N: Tensor) -> Tensor:
        """The sums of `figures_N` over all ranks and, with many ranks, behind them what the ranks told."""
        if self.mesh is None:
            return figures_N
        told_N = torch.tensor(self._told, dtype=figures_N.dtype).to(figures_N.device, non_blocking=True)
        return self.mesh.all_sum(torch.cat([figures_N, told_N]))

    def forget(self) -> None:
        """Begin anew: what was told and heard belongs to a run before."""
        self._told = [0.0] * len(Note)
        self._heard = [0.0] * len(Note)

    def tell(self, note: Note) -> None:
        """Let every rank know with the next step; may be called in a signal handler."""
        self._told[note] = 1.0

    def hear(self, notes: Sequence[float]) -> None:
        """Take what stood behind the sums of a step."""
        self._heard = list(notes)

    def heard(self, note: Note) -> bool:
        """Whether any rank told `note` up to the last step; the same on all ranks."""
        return (self._told if self.mesh is None else self._heard)[note] > 0
