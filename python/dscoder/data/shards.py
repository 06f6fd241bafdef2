"""Packed windows on disk: fixed-length rows of tokens, and where documents end in each.

A split is a directory of shards of three memory-mapped arrays: `tokens-00000.npy` [windows, window] (uint16
when the vocabulary allows, else uint32), `ends-00000.npy`, the end offsets (exclusive) of the documents of
all windows in a row, and `first-00000.npy` [windows + 1], where a window's offsets begin. What lies
behind a window's last document is padding. A document longer than a window is several documents here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dscoder.text.pack import PackPlan

Array = NDArray[np.unsignedinteger]


def token_dtype(vocab_size: int) -> np.dtype[np.uint16 | np.uint32]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _save(path: Path, array: NDArray[np.integer]) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def write_shard(
    directory: Path, shard_idx: int, *, documents: Sequence[Array], plan: PackPlan, fill: int
) -> None:
    """Write the windows that `plan` makes of `documents` (token ids, all of one type); `fill` pads them."""
    dtype = documents[0].dtype if documents else np.dtype(np.uint16)
    tokens_NS = np.full((plan.num_windows, plan.window), fill, dtype=dtype)
    window_P = np.repeat(np.arange(plan.num_windows), np.diff(plan.begin))
    offset_P, length_P = plan.offsets(), plan.length_P
    columns = (window_P, offset_P, plan.document_P, plan.start_P, length_P)
    for window, offset, document, start, length in zip(*(column.tolist() for column in columns), strict=True):
        tokens_NS[window, offset : offset + length] = documents[document][start : start + length]
    directory.mkdir(parents=True, exist_ok=True)
    _save(directory / f"tokens-{shard_idx:05d}.npy", tokens_NS)
    _save(directory / f"ends-{shard_idx:05d}.npy", (offset_P + length_P).astype(np.int32))
    _save(directory / f"first-{shard_idx:05d}.npy", plan.begin)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    tokens_NS: Array
    ends: NDArray[np.int32]
    first: NDArray[np.int64]


class Windows:
    """The windows of one split, read where they lie."""

    def __init__(self, directory: Path) -> None:
        """Map every shard of `directory`; nothing is read yet."""
        paths = sorted(directory.glob("tokens-*.npy"))
        if not paths:
            raise ValueError(f"{directory} must hold the windows of `dscoder prepare`, got no tokens-*.npy")
        self._shards = [
            _Shard(
                tokens_NS=np.load(path, mmap_mode="r"),
                ends=np.load(path.with_name(path.name.replace("tokens", "ends")), mmap_mode="r"),
                first=np.load(path.with_name(path.name.replace("tokens", "first")), mmap_mode="r"),
            )
            for path in paths
        ]
        sizes = [len(shard.tokens_NS) for shard in self._shards]
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        self.window = int(self._shards[0].tokens_NS.shape[1])

    def __len__(self) -> int:
        """How many windows there are."""
        return int(self._starts[-1])

    def read(self, window_idx: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens [window] of window `window_idx`, and the end offsets of its documents."""
        if not 0 <= window_idx < len(self):
            raise ValueError(f"Windows.read: window_idx must be in [0, {len(self)}), got {window_idx}")
        shard_idx = int(np.searchsorted(self._starts, window_idx, side="right")) - 1
        shard, row = self._shards[shard_idx], window_idx - int(self._starts[shard_idx])
        ends = np.asarray(shard.ends[shard.first[row] : shard.first[row + 1]], dtype=np.int32)
        return np.asarray(shard.tokens_NS[row], dtype=np.int64), ends
