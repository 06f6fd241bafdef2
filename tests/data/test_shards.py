"""Packed windows on disk: a damaged file is named before a model sees it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dscoder.data.shards import Windows, load_array, write_shard
from dscoder.text.pack import pack


def shard(directory: Path, shard_idx: int = 0, *, window: int = 8) -> None:
    """Two windows, of the documents 7 7 7 7 7 and 5 5 5 5."""
    documents = [np.full(5, 7, dtype=np.uint16), np.full(4, 5, dtype=np.uint16)]
    write_shard(directory, shard_idx, documents=documents, plan=pack([5, 4], window=window), fill=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    np.save(path, np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, empty, pickled])
@pytest.mark.parametrize("name", ["tokens", "ends", "first"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    shard(tmp_path)
    damage(tmp_path / f"{name}-00000.npy")
    with pytest.raises(ValueError, match=rf"{name}-00000\.npy must be a whole \.npy file, got"):
        Windows(tmp_path)


@pytest.mark.parametrize("name", ["ends", "first"])
def test_a_file_that_is_gone_is_named(tmp_path: Path, name: str) -> None:
    shard(tmp_path)
    (tmp_path / f"{name}-00000.npy").unlink()
    with pytest.raises(ValueError, match=rf"{name}-00000\.npy must be a whole \.npy file, got"):
        Windows(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "tokens",
            np.zeros(8, dtype=np.uint16),
            r"tokens-00000\.npy must hold integers along 2 axes, got uint16",
        ),
        ("tokens", np.zeros((2, 8)), r"tokens-00000\.npy must hold integers along 2 axes, got float64"),
        ("first", np.array([0, 1]), r"first-00000\.npy must hold 3 offsets, .* got 2"),
        ("ends", np.array([5], dtype=np.int32), r"ends-00000\.npy must hold 2 ends, .* got 1"),
    ],
)
def test_arrays_that_do_not_go_together_are_named(
    tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    shard(tmp_path)
    np.save(tmp_path / f"{name}-00000.npy", array)
    with pytest.raises(ValueError, match=message):
        Windows(tmp_path)


@pytest.mark.parametrize("ends", [[9, 4], [0, 4], [-1, 4]])
def test_documents_that_end_outside_their_window_are_refused(tmp_path: Path, ends: list[int]) -> None:
    shard(tmp_path)
    np.save(tmp_path / "ends-00000.npy", np.array(ends, dtype=np.int32))
    windows = Windows(tmp_path)
    with pytest.raises(
        ValueError, match=r"tokens-00000\.npy: .*window 0 must end in rising order in \(0, 8\]"
    ):
        windows.read(0)
    assert windows.read(1)[1].tolist() == [4]


def test_documents_that_end_out_of_order_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, window=16)
    np.save(tmp_path / "ends-00000.npy", np.array([9, 5], dtype=np.int32))
    with pytest.raises(ValueError, match=r"must end in rising order in \(0, 16\], got \[9, 5\]"):
        Windows(tmp_path).read(0)


def test_shards_of_different_windows_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, 0)
    shard(tmp_path, 1, window=16)
    with pytest.raises(ValueError, match=r"tokens-00001\.npy must hold windows of 8 tokens, .* got 16"):
        Windows(tmp_path)


def test_a_token_beyond_the_vocabulary_is_named_with_its_file(tmp_path: Path) -> None:
    shard(tmp_path)
    assert Windows(tmp_path, vocab_size=8).read(0)[0].max() == 7
    windows = Windows(tmp_path, vocab_size=7)
    with pytest.raises(
        ValueError, match=r"tokens-00000\.npy must hold token ids below 7, .* got 7 in window 0"
    ):
        windows.read(0)
    assert windows.read(1)[0].max() == 5


def test_an_array_is_mapped_not_copied(tmp_path: Path) -> None:
    shard(tmp_path)
    assert isinstance(load_array(tmp_path / "ends-00000.npy"), np.memmap)
