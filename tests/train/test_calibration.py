"""Reliability bins and the calibration error."""

import pytest

from dscoder.train.calibration import expected_calibration_error, reliability


def test_cases_fall_into_bins_of_equal_width() -> None:
    bins = reliability([0.0, 0.24, 0.25, 1.0], [0, 1, 1, 1], num_bins=4)
    assert [item.count for item in bins] == [2, 1, 0, 1]
    assert [(item.low, item.high) for item in bins] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert (bins[0].predicted, bins[0].observed) == (0.12, 0.5)
    assert (bins[2].predicted, bins[2].observed) == (None, None)


def test_the_error_weighs_bins_by_their_cases() -> None:
    bins = reliability([0.1, 0.1, 0.1, 0.9], [0, 0, 0, 0.5], num_bins=2)
    assert expected_calibration_error(bins) == pytest.approx((3 * 0.1 + 0.4) / 4)


def test_what_comes_true_as_often_as_predicted_has_no_error() -> None:
    bins = reliability([0.25] * 4 + [0.75] * 4, [0, 0, 0, 1, 1, 1, 1, 0])
    assert expected_calibration_error(bins) == 0


def test_bins_may_begin_at_a_half() -> None:
    bins = reliability([0.5, 0.99, 1.0], [0, 1, 1], low=0.5, num_bins=5)
    assert [item.count for item in bins] == [1, 0, 0, 0, 2]


def test_no_case_has_no_error() -> None:
    assert expected_calibration_error(reliability([], [])) == 0


@pytest.mark.parametrize(
    ("predicted", "message"),
    [([0.2, 0.3], "one length, got 2 and 1"), ([1.5], r"in \[0.0, 1.0\], got 1.5"), ([float("nan")], "nan")],
)
def test_what_is_no_prediction_is_refused(predicted: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reliability(predicted, [0.0])
