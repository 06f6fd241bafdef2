"""Latent decoding on sm_90a, played in any order of events (dscoder.testing.decode_pipeline)."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.testing.decode_pipeline import Design, Piece, explore
from dscoder.testing.examples import FIXED
from dscoder.testing.pipeline import is_seen

# One buffer cannot have a block's scores ahead of the products on the block before it.
DESIGNS = [Design(num_buffers=1), Design(), Design(scores_first=True)]
pieces_of_parts = st.lists(
    st.builds(Piece, num_blocks=st.sampled_from([0, 1, 1, 2, 3, 4, 7]), is_ragged=st.booleans()), max_size=5
)


@settings(FIXED, max_examples=150)
@given(design=st.sampled_from(DESIGNS), pieces=pieces_of_parts, seed=st.integers(0, 2**32))
def test_any_pieces_in_any_order_come_to_an_end(design: Design, pieces: list[Piece], seed: int) -> None:
    explore(design, pieces, seed)


@pytest.mark.parametrize("counts", [[1], [2], [1, 1, 1, 1], [3, 1, 3], [5, 0, 2], [9]])
@pytest.mark.parametrize("design", DESIGNS)
def test_few_blocks(design: Design, counts: list[int]) -> None:
    for is_ragged in (False, True):
        for seed in range(5):
            explore(design, [Piece(num_blocks=count, is_ragged=is_ragged) for count in counts], seed)


MISTAKES = {
    "the loader waits for the wrong phase first": Design(load_phase=0),
    "the owner's half is loaded before it is free": Design(waits_for_halves=(False, True)),
    "the other half is loaded before it is free": Design(waits_for_halves=(True, False)),
    "queries are loaded before they are free": Design(waits_for_queries=False),
    "a block is released before its product is over": Design(finishes_before_release=False),
    "the block behind the last own one is not released": Design(releases_last=False),
    "queries that a warpgroup does not use are not released": Design(releases_queries_unused=False),
    "weights are written while other warps read scores": Design(meets_before_weights=False),
    "weights are told of before they are there": Design(tells_behind_weights=False),
    "the other one's weights are not waited for": Design(follows_told=False),
    "rows behind a sequence are left": Design(blanks=False),
    "warps do not meet after blanking": Design(meets_after_blanking=False),
    "sums are read before all are there": Design(meets_for_sums=False),
    "the next piece's sums take the place of this one's": Design(num_sum_slots=1),
    "one buffer, and scores ahead": Design(num_buffers=1, scores_first=True),
}
MANY_PIECES = [
    Piece(num_blocks=3, is_ragged=True),
    Piece(num_blocks=1, is_ragged=True),
    Piece(num_blocks=0),
    Piece(num_blocks=6),
    Piece(num_blocks=1),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    assert is_seen(partial(explore, MISTAKES[mistake], MANY_PIECES), num_seeds=30)
