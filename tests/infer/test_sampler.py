"""Draws: greedy, temperature, top-k, top-p, and independence of the rest of the batch."""

import math

import pytest
import torch
from torch import Tensor

from dscoder.config.generate import SamplingConfig
from dscoder.infer import sampler
from dscoder.infer.sampler import add_logprobs, draw_numbers, has_filters, likeliest, uniform


def draw(step: int = 0, **sampling: float) -> tuple[float, ...]:
    return draw_numbers(SamplingConfig(**sampling), step)


def answer(logits_BV: Tensor, draws: list[tuple[float, ...]]) -> list[list[float]]:
    """The peak and the token of each row."""
    how_B4 = torch.tensor(draws, dtype=torch.float64)
    return sampler.draw(logits_BV, likeliest(logits_BV), how_B4).tolist()


def sample(logits_BV: Tensor, draws: list[tuple[float, ...]]) -> list[int]:
    return [int(token) for token in answer(logits_BV, draws)[1]]


def draw_many(logits: list[float], num_draws: int, **sampling: float) -> list[int]:
    """One request's tokens over many steps of the same logits."""
    draws = [draw(step, **sampling) for step in range(num_draws)]
    return sample(torch.tensor([logits] * num_draws), draws)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 5.0]])
    assert sample(logits_BV, [draw(), draw()]) == [1, 0]


def test_shares_follow_the_softmax_of_the_logits_over_the_temperature() -> None:
    tokens = draw_many([0.0, math.log(2.0), math.log(4.0)], 20000, temperature=2.0)
    weights = [1.0, math.sqrt(2.0), 2.0]
    for token, weight in enumerate(weights):
        share = tokens.count(token) / len(tokens)
        assert share == pytest.approx(weight / sum(weights), abs=0.012)


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draw_many([0.0, 2.0, 1.0, 1.5], 500, temperature=5.0, top_k=2)) == {1, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    assert set(draw_many(logits, 2000, temperature=1.0, top_p=0.4)) == {1}
    assert set(draw_many(logits, 2000, temperature=1.0, top_p=0.51)) == {1, 2}
    assert set(draw_many(logits, 2000, temperature=1.0)) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_left() -> None:
    # Of 0.5 and 0.3 the first has 0.625, so 0.6 is reached with it alone; of all four it is not.
    logits = [math.log(p) for p in (0.1, 0.5, 0.3, 0.1)]
    assert set(draw_many(logits, 2000, temperature=1.0, top_p=0.6, top_k=2)) == {1}
    assert set(draw_many(logits, 2000, temperature=1.0, top_p=0.6)) == {1, 2}


def test_forbidden_tokens_are_never_drawn() -> None:
    tokens = draw_many([-math.inf, 0.0, -math.inf, 0.0], 2000, temperature=3.0)
    assert set(tokens) == {1, 3}


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(draw_many([1.0, 1.001, 0.5], 100, temperature=1e-8)) == {1}


def test_a_token_depends_neither_on_the_other_rows_nor_on_its_place() -> None:
    logits_BV = torch.randn(7, 50, generator=torch.Generator().manual_seed(3))
    draws = [
        draw(step=i, seed=10 + i, temperature=0.0 if i == 2 else 0.7 + 0.1 * i, top_p=0.9) for i in range(7)
    ]
    together = sample(logits_BV, draws)
    order = [4, 0, 6, 2, 5, 1, 3]
    assert sample(logits_BV[order], [draws[i] for i in order]) == [together[i] for i in order]
    assert [sample(logits_BV[i : i + 1], draws[i : i + 1])[0] for i in range(7)] == together


def test_tokens_lie_by_their_ids_without_filters_and_likeliest_first_with_one() -> None:
    logits_BV = torch.tensor([[math.log(p) for p in (0.2, 0.5, 0.3)]] * 4)
    shares = [0.1, 0.6, 0.75, 0.95]
    assert sample(logits_BV, [(1.0, 0.0, 1.0, share) for share in shares]) == [0, 1, 2, 2]
    assert sample(logits_BV, [(1.0, 3.0, 1.0, share) for share in shares]) == [1, 2, 2, 0]
    mixed = [(1.0, 0.0, 1.0, 0.1), (1.0, 3.0, 1.0, 0.1), (1.0, 0.0, 1.0, 0.95), (1.0, 0.0, 0.999, 0.95)]
    assert sample(logits_BV, mixed) == [0, 1, 2, 0]


def test_rows_without_filters_need_no_sort() -> None:
    logits_BV = torch.randn(40, 300, generator=torch.Generator().manual_seed(4))
    draws = [draw(step, temperature=0.5 * (step % 3)) for step in range(40)]
    assert not has_filters(draws)
    how_B4 = torch.tensor(draws, dtype=torch.float64)
    unsorted = sampler.draw(logits_BV, likeliest(logits_BV), how_B4, is_filtered=False)
    assert unsorted.tolist() == answer(logits_BV, draws)


def test_one_row_with_a_filter_is_enough_to_sort() -> None:
    plain = draw(temperature=1.0)
    assert has_filters([plain, draw(temperature=1.0, top_p=0.9)])
    assert has_filters([draw(temperature=1.0, top_k=5), plain])
    assert not has_filters([plain, draw()])


def test_another_seed_draws_other_tokens() -> None:
    logits = [0.0] * 64
    runs = [draw_many(logits, 20, temperature=1.0, seed=seed) for seed in (0, 1, 2**63)]
    assert len({tuple(run) for run in runs}) == 3
    assert runs[0] == draw_many(logits, 20, temperature=1.0, seed=0)


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    values = [uniform(seed, step) for seed in range(20) for step in range(500)]
    counts = [sum(i / 10 <= value < (i + 1) / 10 for value in values) for i in range(10)]
    assert sum(counts) == len(values) == len(set(values))
    assert all(abs(count - 1000) < 120 for count in counts)  # four standard deviations


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_peak_gives_away_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits_BV = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [-math.inf] * 3])
    peaks, tokens = answer(logits_BV, [draw(step, temperature=temperature) for step in range(3)])
    assert [math.isfinite(peak) for peak in peaks] == [True, False, False]
    assert all(0 <= token < 3 for token in tokens)  # whoever reads them first finds the peak


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    logits_BV = torch.tensor([[0.0, 0.1, 0.0]] * 200)
    draws = [draw(step, temperature=9.0 if step % 2 else 0.0) for step in range(200)]
    tokens = sample(logits_BV, draws)
    assert set(tokens[::2]) == {1} == set(likeliest(logits_BV)[1].int().tolist())
    assert set(tokens[1::2]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.5)]
)
def test_sampling_config_rejects_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"SamplingConfig: {field} must be .* got {value}"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize("field", ["top_k", "seed"])
def test_sampling_config_rejects_negative_counts(field: str) -> None:
    with pytest.raises(ValueError, match=f"SamplingConfig: {field} must be >= 0, got -1"):
        SamplingConfig(**{field: -1})


def test_log_probabilities_are_those_of_the_softmax_at_the_temperature() -> None:
    logits_BV = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(9.0)], [1.0, 1.0]])
    how_B4 = torch.tensor([draw(), draw(temperature=2.0), draw(temperature=1e-8)], dtype=torch.float64)
    answer_2B = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    found = add_logprobs(logits_BV, answer_2B, how_B4)
    assert torch.equal(found[:2], answer_2B)
    assert found[2].tolist() == pytest.approx([math.log(p) for p in (3 / 4, 1 / 4, 1 / 2)])


def test_filters_do_not_change_log_probabilities() -> None:
    logits_BV = torch.randn(1, 9, generator=torch.Generator().manual_seed(1))
    answer_2B = likeliest(logits_BV)
    filtered_B4 = torch.tensor([draw(temperature=1.0, top_k=1, top_p=0.1)], dtype=torch.float64)
    assert torch.equal(
        add_logprobs(logits_BV, answer_2B, filtered_B4)[2], add_logprobs(logits_BV, answer_2B, None)[2]
    )


def test_log_probabilities_are_computed_in_float32() -> None:
    logits_BV = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    answer_2B = likeliest(logits_BV)
    wanted_BV = logits_BV.double().log_softmax(dim=-1)
    wanted_B = wanted_BV.gather(1, answer_2B[1, :, None].long())[:, 0]
    torch.testing.assert_close(add_logprobs(logits_BV, answer_2B, None)[2], wanted_B, rtol=1e-6, atol=1e-6)
