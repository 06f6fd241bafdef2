"""Prefill attention on sm_90a, played in any order of events (dscoder.testing.prefill_pipeline)."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.testing.examples import FIXED
from dscoder.testing.pipeline import is_seen
from dscoder.testing.prefill_pipeline import Design, Tile, explore

DESIGNS = [Design(num_stages=stages, takes_turns=turns) for stages in (1, 2) for turns in (False, True)]
tiles_of_blocks = st.lists(
    st.builds(Tile, num_blocks=st.sampled_from([1, 1, 2, 3, 4, 7]), is_ragged=st.booleans())
    | st.just(Tile(num_blocks=0)),
    max_size=5,
)


@settings(FIXED, max_examples=150)
@given(design=st.sampled_from(DESIGNS), tiles=tiles_of_blocks, seed=st.integers(0, 2**32))
def test_any_tiles_in_any_order_come_to_an_end(design: Design, tiles: list[Tile], seed: int) -> None:
    explore(design, tiles, seed)


@pytest.mark.parametrize("counts", [[1], [2], [1, 1, 1, 1], [3, 1, 3], [5, 2], [9]])
@pytest.mark.parametrize("design", DESIGNS)
def test_few_blocks(design: Design, counts: list[int]) -> None:
    for is_ragged in (False, True):
        for seed in range(5):
            explore(design, [Tile(num_blocks=count, is_ragged=is_ragged) for count in counts], seed)


MISTAKES = {
    "the loader waits for the wrong phase first": Design(load_phase=0),
    "keys are loaded before they are free": Design(waits_for_keys=False),
    "values are loaded before they are free": Design(waits_for_values=False),
    "queries are loaded before they are free": Design(waits_for_queries=False),
    "a tile is told of where the one before it still stands": Design(num_slots=1),
    "keys are released before their scores are over": Design(finishes_scores=False),
    "values are released before their product is over": Design(finishes_values=False),
    "weights are rounded while a product reads them": Design(rounds_late=False),
    "a tile that sees nothing does not release its queries": Design(releases_blind=False),
    "the last block's values are not released": Design(releases_last=False),
    "a turn is kept at the end of a tile": Design(gives_last=False),
    "nobody begins": Design(has_first_turn=False),
    "rows behind a sequence are left": Design(blanks=False),
    "values are blanked before they are there": Design(blanks_full=False),
    "warps do not meet after blanking": Design(meets_after_blanking=False),
    "a warpgroup blanks in its turn": Design(blanks_ahead_of_turn=False),
}
MANY_TILES = [
    Tile(num_blocks=3, is_ragged=True),
    Tile(num_blocks=1, is_ragged=True),
    Tile(num_blocks=0),
    Tile(num_blocks=6),
    Tile(num_blocks=1),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    assert is_seen(partial(explore, MISTAKES[mistake], MANY_TILES), num_seeds=30)
