"""How large a cache is planned, and which of its pages are free."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.infer.pages import PagePool, Room, plan_room
from dscoder.models.cache import PAGE_SIZE

# ---- the pool ----


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_no_page_is_given_twice_and_none_is_lost(num_pages: int, moves: list[tuple[bool, int]]) -> None:
    pool, taken = PagePool(num_pages), []
    for is_taking, count in moves:
        if is_taking and count <= pool.num_free:
            taken += pool.take(count)
        elif not is_taking:
            pool.give_back(taken[:count])
            taken = taken[count:]
        assert len(set(taken)) == len(taken) == num_pages - pool.num_free
        assert set(taken) <= set(range(num_pages))
    pool.give_back(taken)
    assert sorted(pool.take(num_pages)) == list(range(num_pages))


@pytest.mark.parametrize("count", [-1, 3])
def test_more_than_is_free_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"PagePool: count must be in \[0, 2\], got {count}"):
        PagePool(2).take(count)


@pytest.mark.parametrize("page", [-1, 0, 2, 4])
def test_what_is_not_taken_cannot_be_given_back(page: int) -> None:
    pool = PagePool(4)
    pool.give_back(pool.take(1))
    pool.take(1)
    pool.take(1)
    pool.give_back([0])
    with pytest.raises(ValueError, match=f"a page given back must be a taken one, got {page}"):
        pool.give_back([page])


def test_a_pool_has_no_negative_size() -> None:
    with pytest.raises(ValueError, match="num_pages must be >= 0, got -1"):
        PagePool(-1)


# ---- the room ----


def plan(lengths: list[int], **given: object) -> Room:
    return plan_room(
        lengths, **{"max_batch": 4, "max_tokens": 10**9, "is_paged": True, "is_kept": False, **given}
    )


def test_pages_are_those_of_the_largest_requests_that_may_run_together() -> None:
    room = plan([1, 64, 65, 500, 130], max_batch=3)
    assert room == Room(num_rows=3, max_positions=500, num_pages=8 + 3 + 2)


def test_rows_with_memory_of_their_own_are_as_long_as_the_longest_request() -> None:
    room = plan([1, 64, 65, 500, 130], is_paged=False)
    assert room == Room(num_rows=4, max_positions=500, num_pages=None)


def test_a_cache_that_is_kept_grows_in_powers_of_two() -> None:
    assert plan([70] * 3, max_batch=100, is_kept=True) == Room(num_rows=4, max_positions=128, num_pages=8)
    assert plan([70] * 3, max_batch=3, is_kept=True).num_rows == 3


def test_scarce_memory_bounds_pages_and_rows() -> None:
    assert plan([100] * 4, max_tokens=300).num_pages == 300 // PAGE_SIZE
    assert plan([100] * 4, max_tokens=300, is_paged=False).num_rows == 3
    # Rounded up, not even one row would fit.
    kept = plan([100], max_tokens=120, is_paged=False, is_kept=True)
    assert kept == Room(num_rows=1, max_positions=100, num_pages=None)


@given(st.data())
def test_every_plan_holds_its_longest_request(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=9))
    max_tokens = data.draw(st.integers(max(*lengths, 2), 3000))
    is_paged, is_kept = data.draw(st.booleans()), data.draw(st.booleans())
    room = plan(
        lengths,
        max_batch=data.draw(st.integers(1, 6)),
        max_tokens=max_tokens,
        is_paged=is_paged,
        is_kept=is_kept,
    )
    longest = max(*lengths, 2)
    assert room.num_rows >= 1
    assert room.max_positions >= longest
    if room.num_pages is None:
        assert room.num_rows * room.max_positions <= max_tokens
    else:
        assert room.num_pages * PAGE_SIZE >= max(lengths)
        assert room.num_pages * PAGE_SIZE < max(max_tokens, longest) + PAGE_SIZE


@pytest.mark.parametrize("is_paged", [False, True])
def test_too_little_memory_for_one_request_is_an_error(is_paged: bool) -> None:
    with pytest.raises(ValueError, match="room for the 300 tokens of the longest request, got room for 299"):
        plan([5, 300, 7], max_tokens=299, is_paged=is_paged)


@pytest.mark.parametrize(
    ("has", "is_enough"),
    [((4, 128, 8), True), ((3, 128, 8), False), ((4, 127, 8), False), ((4, 128, 7), False)],
)
def test_a_room_is_enough_if_no_size_is_smaller(has: tuple[int, int, int], is_enough: bool) -> None:
    names = ("num_rows", "max_positions", "num_pages")
    room = Room(**dict(zip(names, has, strict=True)))
    assert room.holds(Room(num_rows=4, max_positions=128, num_pages=8)) is is_enough
