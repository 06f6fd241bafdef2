"""Dispatch and combine between ranks that share a device, in the fewest torch calls.

What an all-to-all over one device comes to: each rank gathers the rows that leave it into one buffer, rank
by rank; every rank copies what is its own out of all of them. Not timed: the index of every row, made from
`slot_TR` once. Nothing waits for the GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscoder.testing.peer import Run

Tensors = tuple[Tensor, ...]


def _sent_tokens(slot: Tensors) -> list[Tensor]:
    """The tokens of each rank's send buffer: those for rank 0 first, in order."""
    return [torch.cat([(column >= 0).nonzero().flatten() for column in slot_TR.T]) for slot_TR in slot]


def _parts(slot: Tensors) -> list[list[int]]:
    """[source][target]: rows."""
    return [(slot_TR >= 0).sum(dim=0).tolist() for slot_TR in slot]


def _turned(buffers: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Every rank's part of all buffers, in the order of the sources: the copies of the all-to-all."""
    pieces = [torch.split(buffer, list(sizes)) for buffer, sizes in zip(buffers, parts, strict=True)]
    return [torch.cat(rows) for rows in zip(*pieces, strict=True)]


def dispatch(num_local_experts: int) -> Callable[..., Run]:
    """`index_select` a rank, then `cat` a rank, of the rows and of the words with indices and weights."""

    def prepare(x: Tensors, idx: Tensors, weight: Tensors, slot: Tensors, _: Tensors) -> Run:
        tokens, parts = _sent_tokens(slot), _parts(slot)

        def call() -> tuple[list[Tensor], list[Tensor]]:
            words = [torch.cat([i, w.view(torch.int32)], dim=1) for i, w in zip(idx, weight, strict=True)]
            arrived = []
            for values in (x, words):
                buffers = [rows.index_select(0, token) for rows, token in zip(values, tokens, strict=True)]
                arrived.append(_turned(buffers, parts))
            return arrived[0], arrived[1]

        def read(arrived: tuple[list[Tensor], list[Tensor]]) -> tuple[Any, ...]:
            rows, words = arrived
            num_topk = idx[0].shape[1]
            local = [word[:, :num_topk] - rank * num_local_experts for rank, word in enumerate(words)]
            is_local = [(i >= 0) & (i < num_local_experts) for i in local]
            kept = [i.masked_fill(~is_here, -1) for i, is_here in zip(local, is_local, strict=True)]
            weights = [word[:, num_topk:].contiguous().view(torch.float32) for word in words]
            return tuple(rows), tuple(kept), tuple(weights)

        return Run(call=call, read=read)

    return prepare


def combine(y: Tensors, slot: Tensors, _count: Tensors, _came: Tensors) -> Run:
    """`cat` a rank for the way back, then a gather, with a row of zeros for none, and a sum in float32."""
    parts = _parts(slot)
    back = [list(sizes) for sizes in zip(*parts, strict=True)]
    rows = []
    for slot_TR, sizes in zip(slot, parts, strict=True):
        begins = torch.tensor([0, *sizes[:-1]], device=slot_TR.device).cumsum(0)
        rows.append(torch.where(slot_TR >= 0, slot_TR + begins, sum(sizes)).flatten())
    zeros = y[0].new_zeros(1, y[0].shape[1])

    def call() -> tuple[Tensor, ...]:
        returned = _turned(y, back)
        found = []
        for buffer, row, slot_TR in zip(returned, rows, slot, strict=True):
            gathered_TRD = torch.cat([buffer, zeros]).index_select(0, row).view(*slot_TR.shape, -1)
            found.append(gathered_TRD.sum(dim=1, dtype=torch.float32).to(buffer.dtype))
        return tuple(found)

    return Run(call=call)
