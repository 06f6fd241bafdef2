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
    tokens: Path  # the file, for messages
    tokens_NS: NDArray[np.integer]
    ends: NDArray[np.integer]
    first: NDArray[np.integer]


def load_array(path: Path, *, num_axes: int = 1) -> NDArray[np.integer]:
    """Map a whole array of integers; ValueError naming the file if it is none."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} must be a whole .npy file, got: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != num_axes:
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path} must hold integers along {num_axes} axes, got {got}")
    return array


def _load_shard(path: Path) -> _Shard:
    """The shard of `path`, its tokens; the three arrays go together."""
    ends_path, first_path = (path.with_name(path.name.replace("tokens", kind)) for kind in ("ends", "first"))
    tokens_NS, ends, first = load_array(path, num_axes=2), load_array(ends_path), load_array(first_path)
    if len(first) != len(tokens_NS) + 1:
        raise ValueError(
            f"{first_path} must hold {len(tokens_NS) + 1} offsets, one more than {path.name} has windows, "
            f"got {len(first)}"
        )
    if len(ends) != first[-1]:
        raise ValueError(
            f"{ends_path} must hold {first[-1]} ends, as {first_path.name} says, got {len(ends)}"
        )
    return _Shard(tokens=path, tokens_NS=tokens_NS, ends=ends, first=first)


class Windows:
    """The windows of one split, read where they lie."""

    def __init__(self, directory: Path, *, vocab_size: int | None = None) -> None:
        """Map every shard of `directory`; no token is read yet. None: any token id is right."""
        paths = sorted(directory.glob("tokens-*.npy"))
        if not paths:
            raise ValueError(f"{directory} must hold the windows of `dscoder prepare`, got no tokens-*.npy")
        self._shards = [_load_shard(path) for path in paths]
        self._vocab_size = vocab_size
        sizes = [len(shard.tokens_NS) for shard in self._shards]
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        self.window = int(self._shards[0].tokens_NS.shape[1])
        for shard in self._shards:
            if shard.tokens_NS.shape[1] != self.window:
                raise ValueError(
                    f"{shard.tokens} must hold windows of {self.window} tokens, as {paths[0].name} does, "
                    f"got {shard.tokens_NS.shape[1]}"
                )

    def __len__(self) -> int:
        """How many windows there are."""
        return int(self._starts[-1])

    def read(self, window_idx: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens [window] of window `window_idx`, and the end offsets of its documents."""
        if not 0 <= window_idx < len(self):
            raise ValueError(f"Windows.read: window_idx must be in [0, {len(self)}), got {window_idx}")
        shard_idx = int(np.searchsorted(self._starts, window_idx, side="right")) - 1
        shard, row = self._shards[shard_idx], window_idx - int(self._starts[shard_idx])
        tokens_S = np.asarray(shard.tokens_NS[row], dtype=np.int64)
        ends = np.asarray(shard.ends[shard.first[row] : shard.first[row + 1]], dtype=np.int32)
        edges = np.array([0, *ends, self.window])
        if not (edges[0] < edges[1:]).all() or not (edges[:-1] <= edges[1:]).all():
            raise ValueError(
                f"{shard.tokens}: documents of window {row} must end in rising order in (0, {self.window}], "
                f"got {ends.tolist()[:8]}"
            )
        if self._vocab_size is not None and tokens_S.max() >= self._vocab_size:
            raise ValueError(
                f"{shard.tokens} must hold token ids below {self._vocab_size}, the vocabulary's size, "
                f"got {tokens_S.max()} in window {row}"
            )
        return tokens_S, ends
