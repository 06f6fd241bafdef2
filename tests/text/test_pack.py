import gc
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.text.pack import PackPlan, pack

LENGTHS = st.lists(st.integers(0, 200), max_size=60)
WINDOWS = st.integers(1, 150)


def contents(plan: PackPlan) -> list[list[tuple[int, int, int]]]:
    """Per window its pieces as (document, start, length)."""
    columns = (plan.document_P.tolist(), plan.start_P.tolist(), plan.length_P.tolist())
    pieces = list(zip(*columns, strict=True))
    return [pieces[plan.pieces(w)] for w in range(plan.num_windows)]


def best_fit_decreasing(lengths: list[int], window: int) -> list[list[tuple[int, int, int]]]:
    """The definition, by looking at every open window: the least room, and of equals the last touched."""
    whole = [
        [(document, start, window)]
        for document, length in enumerate(lengths)
        for start in range(0, length - window + 1, window)
    ]
    opened: list[list[tuple[int, int, int]]] = []
    touched: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda d: -(lengths[d] % window)):
        rest = lengths[document] % window
        if rest == 0:
            continue
        rooms = [window - sum(length for _, _, length in pieces) for pieces in opened]
        fitting = [w for w, room in enumerate(rooms) if room >= rest]
        if fitting:
            chosen = min(fitting, key=lambda w: (rooms[w], -touched[w]))
        else:
            chosen = len(opened)
            opened.append([])
            touched.append(0)
        opened[chosen].append((document, lengths[document] - rest, rest))
        touched[chosen] = max(touched) + 1
    return whole + opened


def next_fit(lengths: list[int], window: int) -> int:
    """Windows needed when each piece goes into the last window or opens a new one."""
    num_windows, room = 0, 0
    for length in lengths:
        num_windows += length // window
        rest = length % window
        if rest > room:
            num_windows += 1
            room = window
        room -= rest
    return num_windows


# ---- the plan ----


def test_documents_fill_each_others_rooms() -> None:
    plan = pack([5, 3, 4, 2], window=7)
    assert contents(plan) == [[(0, 0, 5), (3, 0, 2)], [(2, 0, 4), (1, 0, 3)]]
    assert plan.padding_share == 0.0


def test_a_long_document_gives_whole_windows_and_one_rest() -> None:
    plan = pack([2, 17, 5], window=5)
    assert contents(plan) == [
        [(1, 0, 5)],
        [(1, 5, 5)],
        [(1, 10, 5)],
        [(2, 0, 5)],
        [(0, 0, 2), (1, 15, 2)],
    ]
    assert plan.padding_share == pytest.approx(1 / 25)


@given(lengths=LENGTHS, window=WINDOWS)
def test_the_plan_is_best_fit_decreasing(lengths: list[int], window: int) -> None:
    assert contents(pack(lengths, window=window)) == best_fit_decreasing(lengths, window)


@given(lengths=LENGTHS, window=WINDOWS)
def test_every_token_stands_in_one_place_and_no_window_overflows(lengths: list[int], window: int) -> None:
    plan = pack(lengths, window=window)
    seen = [0] * len(lengths)  # tokens of each document so far: pieces come in order
    for pieces in contents(plan):
        assert pieces
        assert sum(length for _, _, length in pieces) <= window
        for document, start, length in pieces:
            assert start == seen[document]
            assert length > 0
            seen[document] += length
    assert seen == lengths
    assert plan.num_tokens == sum(lengths)


@given(lengths=LENGTHS, window=WINDOWS)
def test_nothing_that_fits_is_cut(lengths: list[int], window: int) -> None:
    counts = np.bincount(pack(lengths, window=window).document_P, minlength=len(lengths))
    assert counts.tolist() == [-(-length // window) for length in lengths]


@given(lengths=LENGTHS, window=WINDOWS)
def test_the_padding_is_what_the_windows_do_not_hold(lengths: list[int], window: int) -> None:
    plan = pack(lengths, window=window)
    assert plan.num_windows <= next_fit(lengths, window) * 11 / 9 + 1  # the bound of best-fit decreasing
    assert plan.num_windows >= -(-sum(lengths) // window)
    num_padding = plan.num_windows * window - sum(lengths)
    assert plan.padding_share * plan.num_windows * window == pytest.approx(num_padding, abs=1e-6)


def test_real_source_code_is_packed_with_a_fifth_of_the_padding_of_next_fit() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    lengths = [path.stat().st_size // 3 for path in sorted(library.rglob("*.py"))]  # about 3 bytes a token
    for window in (1024, 4096):
        plan = pack(lengths, window=window)
        next_fit_share = 1 - sum(lengths) / (next_fit(lengths, window) * window)
        assert plan.padding_share < 0.01
        assert next_fit_share > 5 * plan.padding_share


def test_many_documents_reach_every_level_of_the_bitmap() -> None:
    # Rooms from 1 to 300000: four levels of 64.
    window = 300_000
    lengths = np.random.default_rng(0).integers(0, window, size=2000)
    plan = pack(lengths, window=window)
    sums = np.add.reduceat(plan.length_P, plan.begin[:-1])
    assert sums.max() <= window
    assert sums.sum() == lengths.sum()
    assert contents(plan) == best_fit_decreasing(lengths.tolist(), window)


def test_the_same_lengths_give_the_same_plan() -> None:
    lengths = np.random.default_rng(1).integers(0, 5000, size=5000)
    first, second = pack(lengths, window=4096), pack(lengths.astype(np.int32).tolist(), window=4096)
    for name in ("document_P", "start_P", "length_P", "begin"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


# ---- what stands in a window ----


def test_boundaries_enclose_every_document_and_the_padding() -> None:
    plan = pack([5, 3, 4], window=8)
    assert contents(plan) == [[(0, 0, 5), (1, 0, 3)], [(2, 0, 4)]]
    assert plan.cu_seqlens(0).tolist() == [0, 5, 8]
    assert plan.cu_seqlens(1).tolist() == [0, 4, 8]
    assert plan.cu_seqlens(1).dtype == np.int32
    assert plan.offsets().tolist() == [0, 5, 0]


@given(lengths=LENGTHS, window=WINDOWS)
def test_boundaries_agree_with_the_pieces(lengths: list[int], window: int) -> None:
    plan = pack(lengths, window=window)
    offsets = plan.offsets().tolist()
    for w, pieces in enumerate(contents(plan)):
        edges = plan.cu_seqlens(w).tolist()
        assert (edges[0], edges[-1]) == (0, window)
        sizes = [end - begin for begin, end in pairwise(edges)]
        assert sizes[: len(pieces)] == [length for _, _, length in pieces]
        assert offsets[plan.pieces(w)] == edges[: len(pieces)]


def test_the_arrays_are_the_memory_that_was_filled() -> None:
    start_P = pack([3] * 1000, window=2).start_P
    gc.collect()
    assert not start_P.flags.owndata
    assert start_P.tolist() == [0] * 1000 + [2] * 1000


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], np.zeros(0, np.int64)])
def test_nothing_gives_no_window(lengths: list[int]) -> None:
    plan = pack(lengths, window=8)
    assert (plan.num_windows, plan.num_tokens, plan.padding_share) == (0, 0, 0.0)
    assert plan.offsets().tolist() == []


# ---- errors ----


@pytest.mark.parametrize(
    ("lengths", "window", "message"),
    [
        ([1, -2], 8, "pack: lengths must be >= 0, got -2"),
        ([1], 0, "pack: window must be between 1 and 16777216, got 0"),
        ([1], 2**24 + 1, "pack: window must be between 1 and 16777216, got 16777217"),
        ([1.5], 8, "pack: lengths must be integers in one dimension, got float64 in 1"),
        ([[1], [2]], 8, "pack: lengths must be integers in one dimension, got int64 in 2"),
    ],
)
def test_wrong_arguments_are_named(lengths: list[int], window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, window=window)


@pytest.mark.parametrize("window_idx", [-1, 1])
def test_a_window_that_is_not_there_is_named(window_idx: int) -> None:
    with pytest.raises(IndexError, match=rf"PackPlan: window_idx must be in \[0, 1\), got {window_idx}"):
        pack([1], window=8).cu_seqlens(window_idx)
