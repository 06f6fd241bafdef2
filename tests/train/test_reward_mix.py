"""Missing rewards in the mix."""

from dscoder.train.reward_mix import mix


def test_the_mix_is_the_weighted_sum() -> None:
    found = mix({"a": [1.0, 0.0], "b": [2.0, 4.0]}, {"a": 1.0, "b": -0.5})
    assert found == (0.0, -2.0)


def test_a_missing_reward_leaves_the_answer_where_its_group_is() -> None:
    # Without the first answer, "a" is 2 on average: neither the 0 of the worst nor a gain.
    found = mix({"a": [None, 0.0, 4.0], "b": [1.0, 1.0, 1.0]}, {"a": 1.0, "b": 1.0})
    assert found == (3.0, 1.0, 5.0)


def test_the_mean_of_equal_rewards_makes_no_variance() -> None:
    assert len(set(mix({"a": [0.1, None, 0.1, 0.1], "b": [0.3] * 4}, {"a": 0.7, "b": 1.1}))) == 1


def test_a_function_that_never_answers_leaves_the_others() -> None:
    assert mix({"a": [None, None], "b": [1.0, 2.0]}, {"a": 5.0, "b": 1.0}) == (1.0, 2.0)


def test_an_answer_without_rewards_has_none() -> None:
    assert mix({"a": [None, 1.0], "b": [None, 2.0]}, {"a": 1.0, "b": 1.0}) == (None, 3.0)
