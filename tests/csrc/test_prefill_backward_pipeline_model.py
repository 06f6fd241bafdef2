"""The gradients of prefill attention on sm_90a, in any order of events (prefill_backward_pipeline)."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscoder.testing.examples import FIXED
from dscoder.testing.pipeline import is_seen
from dscoder.testing.prefill_backward_pipeline import Design, Walk, explore

DESIGNS = [Design(num_stages=1), Design()]
walks = st.builds(
    Walk,
    num_heads=st.sampled_from([1, 1, 2, 3]),
    num_blocks=st.sampled_from([0, 1, 2, 3, 5]),
    is_ragged=st.booleans(),
    has_ragged_keys=st.booleans(),
)


@settings(FIXED, max_examples=150)
@given(design=st.sampled_from(DESIGNS), walk=walks, seed=st.integers(0, 2**32))
def test_any_walk_in_any_order_comes_to_an_end(design: Design, walk: Walk, seed: int) -> None:
    explore(design, walk, seed)


MISTAKES = {
    "the loader waits for the wrong phase first": Design(load_phase=0),
    "queries are loaded before they are free": Design(waits_for_queries=False),
    "P is written while a product reads that of the block before": Design(waits_for_weights=False),
    "a warpgroup's P is read before it is there": Design(meets_own=False),
    "dS is read before both have written it": Design(meets_all=False),
    "operands are released before their product is over": Design(finishes=False),
    "sums are written while the copy engine reads those before": Design(waits_for_sums=False),
    "sums of one warpgroup are added before the other's": Design(sums_count=4),
    "sums are released before the copy engine has read them": Design(reads_before_release=False),
    "rows behind a sequence are left": Design(blanks=False),
    "rows are blanked before their bytes have come": Design(blanks_full=False),
    "warps do not meet after blanking": Design(meets_after_blanking=False),
    "results take the place of keys that a product reads": Design(meets_over=False),
}
LONG_WALK = Walk(num_heads=2, num_blocks=3, is_ragged=True, has_ragged_keys=True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake: str) -> None:
    assert is_seen(partial(explore, MISTAKES[mistake], LONG_WALK), num_seeds=40)
