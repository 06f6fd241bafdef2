"""The slots and flags of csrc/comm, played in every order (dscoder.testing.exchange_protocol)."""

import pytest

from dscoder.testing.exchange_protocol import ORDERS, Design, Shape, check
from dscoder.testing.pipeline import BrokenError
from dscoder.testing.weak_memory import Mishaps

SOUND = Design()


def without(name: str) -> frozenset[str]:
    assert name in ORDERS
    return ORDERS - {name}


# Forward and backward of an expert layer are DCDC; where its forward is computed again, DCDDC.
SHAPES = [
    (Shape(slots=2, ways="DDD"), 1536),
    (Shape(slots=2, ways="DDC"), 1691),
    (Shape(slots=2, ways="DD", is_uneven=True), 966),
    (Shape(ways="DC", is_exact=True), 1176),
    (Shape(slots=2, ways="DCDDC", blocks=1), 205),
    (Shape(slots=2, ways="DCDCDC", blocks=1, is_uneven=True), 271),
    (Shape(ways="DCDC", blocks=1, streams=2), 1802),
    (Shape(ways="DDC", is_together=True), 1781),
    (Shape(ranks=3, ways="DCDC", blocks=1), 1153),
    (Shape(ranks=3, ways="DDC", blocks=1, is_uneven=True), 595),
]
LARGE_SHAPES = [
    (Shape(slots=2, ways="DCDCDC"), 10421),
    (Shape(slots=2, ways="DCDDC", is_uneven=True), 6021),
    (Shape(ranks=3, ways="D"), 8696),
]


@pytest.mark.parametrize(
    ("shape", "num_states"),
    [*SHAPES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE_SHAPES)],
    ids=str,
)
def test_every_order_of_steps_gives_the_rows_that_were_sent(shape: Shape, num_states: int) -> None:
    explored = check(SOUND, shape)
    assert explored.ends == {((-1,) * shape.ranks, -1)}
    assert explored.num_states == num_states


@pytest.mark.parametrize(
    ("shape", "mortal", "num_states"),
    [
        (Shape(blocks=1, ways="DCDC"), 0, 425),
        (Shape(ways="DC", tells_in_turn=True), 1, 3047),
        (Shape(ranks=3, blocks=1, ways="DC", tells_in_turn=True), 1, 4183),
        (Shape(blocks=1, ways="DCDC", streams=2), 0, 4011),
    ],
    ids=str,
)
def test_when_a_rank_dies_all_others_end_and_know_whom_they_waited_for(
    shape: Shape, mortal: int, num_states: int
) -> None:
    explored = check(SOUND, shape, Mishaps(mortal=mortal))
    assert explored.num_states == num_states
    assert any(dead == mortal for _, dead in explored.ends)


@pytest.mark.parametrize(
    ("shape", "num_states"),
    [
        (Shape(ways="D"), 3084),
        (Shape(blocks=1, ways="DCDC"), 3231),
        (Shape(ranks=3, blocks=1, ways="D"), 2287),
    ],
    ids=str,
)
def test_a_wait_that_ends_too_early_leaves_no_rows_that_were_not_sent(shape: Shape, num_states: int) -> None:
    assert check(SOUND, shape, Mishaps(is_hasty=True)).num_states == num_states


def test_a_rank_may_wait_for_one_that_waits_for_the_dead() -> None:
    """So a record does not name the dead rank by itself; following records does."""
    ends = check(SOUND, Shape(ranks=3, blocks=1, ways="DC", tells_in_turn=True), Mishaps(mortal=1)).ends
    assert any(records[rank] not in (-1, 1) for records, dead in ends if dead == 1 for rank in (0, 2))


def test_two_ranks_name_the_dead() -> None:
    ends = check(SOUND, Shape(ways="DC", tells_in_turn=True), Mishaps(mortal=1)).ends
    assert {records[0] for records, dead in ends if dead == 1} == {-1, 1}


RACE, STUCK, WRONG = "may not be done", "nobody can go on", "finds"
TWICE, FEW_ROWS, MANY_ROWS = Shape(ways="DD"), Shape(ways="DD", is_uneven=True), Shape(ways="DD", slots=2)

# What is planted, where, and how it shows.
MISTAKES: dict[str, tuple[Design, Shape, str]] = {
    "the flag goes ahead of the data": (Design(data_before_flag=False), TWICE, RACE),
    "slots are freed before they are copied": (Design(copies_before_free=False), TWICE, RACE),
    "a sender does not wait for its slots": (Design(waits_for_free=False), TWICE, RACE),
    "one block of a sender waits for all": (Design(all_blocks_wait=False), MANY_ROWS, RACE),
    "a sender waits for an older epoch": (Design(free_epoch=-2), TWICE, STUCK),
    "a receiver waits for an older epoch": (Design(arrived_epoch=-1), TWICE, STUCK),
    "arrivals are told by a relaxed store": (Design(orders=without("release arrived")), TWICE, RACE),
    "freed slots are told by a relaxed store": (Design(orders=without("release freed")), TWICE, RACE),
    "arrivals are seen by a relaxed load": (Design(orders=without("acquire arrived")), TWICE, RACE),
    "freed slots are seen by a relaxed load": (Design(orders=without("acquire freed")), TWICE, RACE),
    "sending blocks are counted without order": (Design(orders=without("count send")), MANY_ROWS, RACE),
    "receiving blocks are counted without order": (Design(orders=without("count receive")), MANY_ROWS, RACE),
    "every block tells for itself": (Design(counts_blocks=False), MANY_ROWS, RACE),
    "the count of blocks is not taken back": (Design(resets_count=False), TWICE, STUCK),
    "every block moves the epoch on": (Design(last_moves_epoch=False), TWICE, RACE),
    "the count is written apart from the epoch": (Design(count_in_flag=False), TWICE, RACE),
    "flags are set and taken back": (Design(epoch_in_flag=False), TWICE, STUCK),
    "both ways share their slots": (Design(own_slots=False), Shape(ways="DCDC"), RACE),
    "a rank with nothing to send does not tell": (Design(tells_idle_peers=False), FEW_ROWS, STUCK),
    "a rank with nothing to send does not wait": (Design(waits_for_idle_peers=False), FEW_ROWS, STUCK),
    "a rank receives before it sends": (Design(sends_first=False), TWICE, STUCK),
}
# Likewise, where waits may end in vain.
MISTAKES_IN_TROUBLE: dict[str, tuple[Design, Shape, Mishaps, str]] = {
    "waits have no end": (Design(has_limit=False), Shape(blocks=1, ways="D"), Mishaps(mortal=0), STUCK),
    "blocks that failed tell like others": (
        *(Design(failed_blocks_tell=True), Shape(blocks=1, ways="D"), Mishaps(is_hasty=True), WRONG),
    ),
    "a rank that has failed goes on with the next launch": (
        *(Design(fails_for_good=False), Shape(blocks=1, ways="DC"), Mishaps(is_hasty=True), WRONG),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    design, shape, sign = MISTAKES[mistake]
    with pytest.raises(BrokenError, match=rf"{sign}[^\n]*$"):
        check(design, shape)


@pytest.mark.parametrize("mistake", MISTAKES_IN_TROUBLE)
def test_a_planted_mistake_is_seen_in_trouble(mistake: str) -> None:
    design, shape, mishaps, sign = MISTAKES_IN_TROUBLE[mistake]
    with pytest.raises(BrokenError, match=rf"{sign}[^\n]*$"):
        check(design, shape, mishaps)


def test_blocks_counted_without_order_are_seen_by_their_rows_too() -> None:
    """Not only by the epoch that the last of them moves on."""
    for name in ("count send", "count receive"):
        with pytest.raises(BrokenError, match=rf"slot[^\n]*{RACE}[^\n]*$"):
            check(Design(orders=without(name), has_epoch_word=False), MANY_ROWS)


def test_the_story_of_a_mistake_is_a_shortest_one() -> None:
    with pytest.raises(BrokenError) as raised:
        check(Design(data_before_flag=False), Shape(blocks=1, ways="D"))
    assert str(raised.value).splitlines() == [
        "rank 0 block 0 waits until dispatch freed 0 at 0 is (0, 0), dispatch freed 1 at 0 is (0, 0)",
        "rank 0 block 0 is counted in dispatch send done of 0",
        "rank 0 block 0 sets dispatch arrived 0 at 0 to (1, 1), dispatch arrived 0 at 1 to (1, 1)",
        "rank 1 block 0 waits until dispatch freed 0 at 1 is (0, 0), dispatch freed 1 at 1 is (0, 0)",
        "rank 1 block 0 is counted in dispatch send done of 1",
        "rank 1 block 0 sets dispatch arrived 1 at 0 to (1, 1), dispatch arrived 1 at 1 to (1, 1)",
        "rank 0 block 0 reads dispatch slot 0 of 1 at 0 for 1, and rank 1 block 0 may not be done writing 1",
    ]


def test_ways_that_take_turns_need_no_wait_for_free_slots() -> None:
    """Rows that came back show that those sent were read; two dispatches in a row do need it."""
    eager = Design(waits_for_free=False)
    check(eager, Shape(ways="DCDC"))
    with pytest.raises(BrokenError, match=rf"slot[^\n]*{RACE}"):
        check(eager, Shape(ways="DCDDC", blocks=1))
