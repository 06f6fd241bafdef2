"""How far stated probabilities can be trusted: reliability bins and the expected calibration error.

Bins have equal widths (Naeini et al. 2015, Guo et al. 2017). The error is the mean over all cases of the
distance between what their bin predicted and what came true in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """The cases whose prediction is in [low, high); the last bin holds its upper end too."""

    low: float
    high: float
    count: int
    predicted: float | None  # mean; None in an empty bin
    observed: float | None  # mean


def reliability(
    predicted: Sequence[float],
    observed: Sequence[float],
    *,
    low: float = 0.0,
    high: float = 1.0,
    num_bins: int = 10,
) -> list[ReliabilityBin]:
    """Bins of equal width over [low, high].

    Args:
        predicted: probabilities in [low, high].
        observed: what came true: 0, 1, or a share between.
    """
    if len(predicted) != len(observed):
        raise ValueError(
            f"reliability: predicted and observed must have one length, got {len(predicted)} and "
            f"{len(observed)}"
        )
    outside = [value for value in predicted if not low <= value <= high]
    if outside:
        raise ValueError(f"reliability: predicted must be in [{low}, {high}], got {outside[0]}")
    width = (high - low) / num_bins
    cases: list[list[int]] = [[] for _ in range(num_bins)]
    for idx, value in enumerate(predicted):
        cases[min(int((value - low) / width), num_bins - 1)].append(idx)
    return [
        ReliabilityBin(
            low=low + number * width,
            high=low + (number + 1) * width,
            count=len(members),
            predicted=_mean([predicted[idx] for idx in members]),
            observed=_mean([observed[idx] for idx in members]),
        )
        for number, members in enumerate(cases)
    ]


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """The mean distance of prediction and truth, bins weighing by their cases; 0 without any."""
    total = sum(item.count for item in bins)
    parts = [
        item.count * abs(item.predicted - item.observed)
        for item in bins
        if item.predicted is not None and item.observed is not None
    ]
    return sum(parts) / total if total else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
