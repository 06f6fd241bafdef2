"""Batches: the order of windows, labels that stay inside documents, positions that can be sought."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.data.loader import IGNORED, assemble, permute, shuffled_batch, window_order
from dscoder.data.shards import Windows, token_dtype, write_shard
from dscoder.text.pack import pack

PAD = 99


def windows_of(directory: Path, lengths: list[int], *, window: int, num_shards: int = 1) -> Windows:
    """Documents whose tokens count up from 100 times their number, packed into each shard."""
    documents = [np.arange(100 * (i + 1), 100 * (i + 1) + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    for shard_idx in range(num_shards):
        write_shard(directory, shard_idx, documents=documents, plan=pack(lengths, window=window), fill=PAD)
    return Windows(directory)


@given(size=st.integers(1, 3000), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_order_visits_every_window_once(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_an_order_is_shuffled_well() -> None:
    order = permute(np.arange(10_000), size=10_000, seed=0, epoch=0)
    # Spearman's rank correlation of a random order is normal with deviation 1 / sqrt(n) = 0.01.
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(np.arange(50), size=50, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_a_position_seeks_into_an_endless_run() -> None:
    whole = window_order(0, 25, size=10, seed=3)
    parts = [window_order(start, 5, size=10, seed=3) for start in range(0, 25, 5)]
    assert whole.tolist() == np.concatenate(parts).tolist()
    assert sorted(whole[:10].tolist()) == sorted(whole[10:20].tolist()) == list(range(10))


def test_labels_stay_inside_documents(tmp_path: Path) -> None:
    batch = assemble(windows_of(tmp_path, [3, 4], window=8), np.array([0]))
    assert batch.tokens_BS.tolist() == [[200, 201, 202, 203, 100, 101, 102, PAD]]
    assert batch.labels_BS.tolist() == [[201, 202, 203, IGNORED, 101, 102, IGNORED, IGNORED]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]


def test_a_full_window_has_no_padding_document(tmp_path: Path) -> None:
    batch = assemble(windows_of(tmp_path, [4, 2, 2], window=4), np.array([0, 1]))
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.cu_seqlens.dtype.itemsize == 4


def test_a_long_document_is_cut_into_documents(tmp_path: Path) -> None:
    batch = assemble(windows_of(tmp_path, [5], window=4), np.array([0, 1]))
    assert batch.tokens_BS.tolist() == [[100, 101, 102, 103], [104, PAD, PAD, PAD]]
    assert batch.labels_BS.tolist() == [[101, 102, 103, IGNORED], [IGNORED] * 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8]


def test_shards_are_one_row_of_windows(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, [4, 3], window=4, num_shards=3)
    assert len(windows) == 6
    rows = [windows.read(i)[0].tolist() for i in range(6)]
    assert rows == [[100, 101, 102, 103], [200, 201, 202, PAD]] * 3


def test_how_a_batch_is_shared_out_does_not_change_it(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, [4] * 7, window=4)
    whole = shuffled_batch(windows, position=5, count=4, seed=1)
    parts = [shuffled_batch(windows, position=5 + i, count=1, seed=1) for i in range(4)]
    assert whole.window_idx == tuple(index for part in parts for index in part.window_idx)
    assert whole.tokens_BS.tolist() == [row for part in parts for row in part.tokens_BS.tolist()]


def test_ids_take_the_smallest_type_that_holds_them() -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, [4], window=4)
    with pytest.raises(ValueError, match=r"window_idx must be in \[0, 1\), got 1"):
        windows.read(1)
    with pytest.raises(ValueError, match="position must be >= 0 and count >= 1, got -1 and 1"):
        shuffled_batch(windows, position=-1, count=1, seed=0)
    with pytest.raises(ValueError, match=r"must hold the windows of `dscoder prepare`, got no tokens"):
        Windows(tmp_path / "nowhere")
