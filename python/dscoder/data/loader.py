"""Batches from packed windows, as a function of one number: how many windows were consumed before.

The order of an epoch is a keyed permutation that gives the n-th window without listing the others, so
seeking costs nothing, and any number of processes can share the position by taking parts of a batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dscoder.data.shards import Windows
from dscoder.runtime.seed import derive_seed

IGNORED = -100  # label of a position without loss
_ROUNDS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Windows side by side; on the CPU as the loader gives it."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64: the next token of the same document if it is learnt, else IGNORED
    cu_seqlens: Tensor  # int32 [documents + 1] over the B * S tokens; padding counts as a document
    window_idx: tuple[int, ...]  # which windows of the split these are


def _mix(value: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    # The finaliser of splitmix64: every output bit depends on every input bit.
    value = (value + np.uint64(key)) & np.uint64(2**64 - 1)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(positions: NDArray[np.int64], *, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a shuffle of range(size) puts `positions`: a bijection, different for each seed and epoch.

    A Feistel network over the next even number of bits; values outside the range walk on until they fall
    inside, which takes fewer than four rounds on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    keys = [derive_seed("order", seed, epoch, round_idx) for round_idx in range(_ROUNDS)]
    value = positions.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        moving = value[outside]
        left, right = moving >> shift, moving & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        value[outside] = (left << shift) | right
        outside = value >= size
    return value.astype(np.int64)


def window_order(position: int, count: int, *, size: int, seed: int) -> NDArray[np.int64]:
    """The windows at positions [position, position + count) of an endless run of shuffled epochs."""
    positions = np.arange(position, position + count, dtype=np.int64)
    order = np.empty_like(positions)
    for epoch in np.unique(positions // size):
        of_epoch = positions // size == epoch
        order[of_epoch] = permute(positions[of_epoch] % size, size=size, seed=seed, epoch=int(epoch))
    return order


def assemble(windows: Windows, window_idx: NDArray[np.int64]) -> Batch:
    """The given windows as one batch."""
    length = windows.window
    tokens_BS = np.empty((len(window_idx), length), dtype=np.int64)
    labels_BS = np.full_like(tokens_BS, IGNORED)
    starts = [np.zeros(1, dtype=np.int32)]
    for row, index in enumerate(window_idx):
        tokens, ends = windows.read(int(index))
        used = int(ends[-1]) if len(ends) else 0
        tokens_BS[row] = tokens
        labels_BS[row, : max(used - 1, 0)] = tokens[1:used]
        labels_BS[row, ends - 1] = IGNORED  # the last token of a document has no next one
        is_learnt_S = windows.loss_mask(int(index))
        if is_learnt_S is not None:
            labels_BS[row, :-1][~is_learnt_S[1:]] = IGNORED
        edges = ends if used == length else np.append(ends, np.int32(length))
        starts.append(edges + np.int32(row * length))
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        cu_seqlens=torch.from_numpy(np.concatenate(starts).astype(np.int32)),
        window_idx=tuple(int(index) for index in window_idx),
    )


def shuffled_batch(windows: Windows, *, position: int, count: int, seed: int) -> Batch:
    """The `count` windows after the first `position` of an endless shuffled run."""
    if position < 0 or count < 1:
        raise ValueError(f"shuffled_batch: position must be >= 0 and count >= 1, got {position} and {count}")
    return assemble(windows, window_order(position, count, size=len(windows), seed=seed))
