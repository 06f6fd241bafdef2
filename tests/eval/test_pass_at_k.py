"""pass@k against hand counts, and intervals against what is known of them."""

import itertools

import pytest

from dscoder.eval.pass_at_k import bootstrap_interval, paired_difference, pass_at_k, wilson_interval


def test_pass_at_1_is_the_share_that_passed() -> None:
    assert pass_at_k(8, 3) == pytest.approx(3 / 8)
    assert [pass_at_k(4, 0), pass_at_k(4, 4)] == [0.0, 1.0]


@pytest.mark.parametrize(("num_passed", "k"), [(1, 2), (2, 3), (4, 2), (3, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(num_passed: int, k: int) -> None:
    draws = list(itertools.combinations(range(5), k))
    found = sum(any(answer < num_passed for answer in draw) for draw in draws) / len(draws)
    assert pass_at_k(5, num_passed, k) == pytest.approx(found)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_numbers_that_cannot_be_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"got k {arguments[2]}, {arguments[0]} answers and {arguments[1]}"):
        pass_at_k(*arguments)


def test_a_wilson_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263, method 3.
    found = wilson_interval(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert found.mean == pytest.approx(81 / 263)


def test_wilson_intervals_stay_inside_0_and_1_and_keep_their_width() -> None:
    none, every = wilson_interval(0, 20), wilson_interval(20, 20)
    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - every.low)
    assert none.high > 0.1


def test_a_bootstrap_interval_is_near_the_normal_one() -> None:
    values = [0.0, 1.0] * 200
    found = bootstrap_interval(values)
    assert found.mean == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.05)


def test_a_bootstrap_follows_its_seed() -> None:
    values = [i * i / 400 for i in range(21)]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_equal_values_leave_nothing_open() -> None:
    found = bootstrap_interval([0.25] * 5)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_a_difference_is_of_pairs() -> None:
    # Far apart from one another, but each pair gains the same: pairing leaves no doubt.
    found = paired_difference([0.0, 0.5, 0.9], [0.1, 0.6, 1.0])
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_what_is_empty_or_unpaired_is_refused() -> None:
    with pytest.raises(ValueError, match="bootstrap_interval: values must hold at least one problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="wilson_interval: values must hold at least one problem"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="must be of the same problems, got 1 and 2 values"):
        paired_difference([1.0], [1.0, 0.0])
