"""Packed windows on disk: fixed-length rows of tokens, and where documents end in each.

A split is a directory of shards of three memory-mapped arrays: `tokens-00000.npy` [windows, window] (uint16
when the vocabulary allows, else uint32), `ends-00000.npy`, the end offsets (exclusive) of the documents of
all windows in a row, and `first-00000.npy` [windows + 1], where a window's offsets begin. What lies
behind a window's last document is padding. A document longer than a window is several documents here.

Where only some tokens are learnt, `mask-00000.npy` [windows, window] (uint8) says which: 1 on those.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dscoder.text.pack import PackPlan, pack

Array = NDArray[np.unsignedinteger]


def token_dtype(vocab_size: int) -> np.dtype[np.uint16 | np.uint32]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _save(path: Path, array: NDArray[np.integer]) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _laid_out(rows: Sequence[Array], plan: PackPlan, *, fill: int) -> Array:
    """One array a document put where `plan` says, `fill` elsewhere: [windows, window]."""
    dtype = rows[0].dtype if rows else np.dtype(np.uint16)
    laid_NS = np.full((plan.num_windows, plan.window), fill, dtype=dtype)
    window_P = np.repeat(np.arange(plan.num_windows), np.diff(plan.begin))
    columns = (window_P, plan.offsets(), plan.document_P, plan.start_P, plan.length_P)
    for window, offset, document, start, length in zip(*(column.tolist() for column in columns), strict=True):
        laid_NS[window, offset : offset + length] = rows[document][start : start + length]
    return laid_NS


def write_shard(
    directory: Path,
    shard_idx: int,
    *,
    documents: Sequence[Array],
    plan: PackPlan,
    fill: int,
    masks: Sequence[Array] | None = None,
) -> None:
    """Write the windows that `plan` makes of `documents` (token ids, all of one type); `fill` pads them.

    `masks` has a uint8 for each token, 1 where it is learnt; None: all are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if masks is not None:
        _save(directory / f"mask-{shard_idx:05d}.npy", _laid_out(masks, plan, fill=0))
    _save(directory / f"ends-{shard_idx:05d}.npy", (plan.offsets() + plan.length_P).astype(np.int32))
    _save(directory / f"first-{shard_idx:05d}.npy", plan.begin)
    _save(directory / f"tokens-{shard_idx:05d}.npy", _laid_out(documents, plan, fill=fill))


class SplitWriter:
    """Collects the documents of one split and packs them, a shard at a time."""

    def __init__(self, directory: Path, *, window: int, fill: int, pool_tokens: int) -> None:
        """Write below `directory`; `pool_tokens` are packed together, and so held in memory."""
        self._directory = directory
        self._window = window
        self._fill = fill
        self._pool_tokens = pool_tokens
        self._documents: list[Array] = []
        self._masks: list[Array] = []
        self._num_waiting = 0  # tokens
        self._num_shards = 0
        self.num_windows = 0  # written so far
        self.num_tokens = 0

    def add(self, ids: Array, mask: Array | None = None) -> None:
        """One more document; all of a split have a mask, or none has."""
        self._documents.append(ids)
        if mask is not None:
            self._masks.append(mask)
        self._num_waiting += len(ids)

    def flush_if_full(self) -> None:
        """Write a shard if a pool of tokens is waiting."""
        if self._num_waiting >= self._pool_tokens:
            self.flush()

    def flush(self) -> None:
        """Write all that is waiting as one shard."""
        if not self._documents:
            return
        plan = pack([len(ids) for ids in self._documents], window=self._window)
        write_shard(
            self._directory,
            self._num_shards,
            documents=self._documents,
            plan=plan,
            fill=self._fill,
            masks=self._masks or None,
        )
        self.num_windows += plan.num_windows
        self.num_tokens += self._num_waiting
        self._documents, self._masks, self._num_waiting = [], [], 0
        self._num_shards += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    tokens: Path  # the file, for messages
    tokens_NS: NDArray[np.integer]
    ends: NDArray[np.integer]
    first: NDArray[np.integer]
    mask_NS: NDArray[np.integer] | None  # None: every token is learnt


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
    mask_path = path.with_name(path.name.replace("tokens", "mask"))
    mask_NS = load_array(mask_path, num_axes=2) if mask_path.is_file() else None
    if mask_NS is not None and mask_NS.shape != tokens_NS.shape:
        raise ValueError(
            f"{mask_path} must be {list(tokens_NS.shape)}, as {path.name} is, got {list(mask_NS.shape)}"
        )
    return _Shard(tokens=path, tokens_NS=tokens_NS, ends=ends, first=first, mask_NS=mask_NS)


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
        shard, row = self._find(window_idx)
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

    def loss_mask(self, window_idx: int) -> NDArray[np.bool_] | None:
        """Which tokens [window] of window `window_idx` are learnt; None: all."""
        shard, row = self._find(window_idx)
        return None if shard.mask_NS is None else np.asarray(shard.mask_NS[row]) != 0

    def _find(self, window_idx: int) -> tuple[_Shard, int]:
        """The shard that holds a window, and the window's row there."""
        if not 0 <= window_idx < len(self):
            raise ValueError(f"Windows.read: window_idx must be in [0, {len(self)}), got {window_idx}")
        shard_idx = int(np.searchsorted(self._starts, window_idx, side="right")) - 1
        return self._shards[shard_idx], window_idx - int(self._starts[shard_idx])
