"""Load figures of layers whose loads a reader can see."""

import pytest
import torch

from dscoder.train.load import load_figures

# Two layers of four experts; eight choices each, of which the second layer dropped two.
COUNTS_LE = torch.tensor([[2, 2, 2, 2], [3, 0, 3, 0]])


def test_the_busiest_is_measured_by_the_mean() -> None:
    figures = load_figures(COUNTS_LE, num_ranks=1, num_choices=16)
    assert figures == {"expert_load_max": 2.0, "expert_load_mean": 1.5, "dropped_share": 0.125}


def test_ranks_hold_neighbouring_experts() -> None:
    figures = load_figures(torch.tensor([[5, 1, 0, 2], [1, 1, 1, 1]]), num_ranks=2, num_choices=12)
    assert figures["rank_load_max"] == 6 / 4
    assert figures["rank_load_mean"] == (6 / 4 + 1) / 2
    assert figures["expert_load_max"] == 5 / 2
    assert figures["dropped_share"] == 0.0
    assert load_figures(COUNTS_LE, num_ranks=2, num_choices=16)["rank_load_max"] == 1.0


@pytest.mark.parametrize("num_choices", [0, 8])
def test_a_layer_without_rows_is_even(num_choices: int) -> None:
    figures = load_figures(torch.zeros(1, 4, dtype=torch.int32), num_ranks=4, num_choices=num_choices)
    assert figures.pop("dropped_share") == (1.0 if num_choices else 0.0)
    assert set(figures.values()) == {1.0}
    assert len(figures) == 4


def test_counts_past_the_integers_of_float32_are_exact() -> None:
    counts_LE = torch.tensor([[2**30 + 1, 2**30 - 1]])
    figures = load_figures(counts_LE, num_ranks=1, num_choices=2**31)
    assert figures["expert_load_max"] == 1 + 2**-30
    assert figures["dropped_share"] == 0.0


def test_a_model_without_experts_has_none() -> None:
    assert load_figures(torch.zeros(0, 0), num_ranks=1, num_choices=0) == {}


def test_ranks_that_cannot_share_the_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks must divide the 4 experts of counts_LE, got 3"):
        load_figures(COUNTS_LE, num_ranks=3, num_choices=16)
    with pytest.raises(ValueError, match="num_ranks must divide the 4 experts of counts_LE, got 0"):
        load_figures(COUNTS_LE, num_ranks=0, num_choices=16)


def test_more_rows_than_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="num_choices must be >= 14, the sum of counts, got 13"):
        load_figures(COUNTS_LE, num_ranks=1, num_choices=13)
