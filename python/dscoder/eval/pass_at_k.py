"""pass@k and how sure it is.

pass@k of a problem is the chance that one of k answers passes, estimated without bias from n answers of which
c passed (Chen et al. 2021): 1 - C(n - c, k) / C(n, k). For k = 1 that is c / n.

The intervals are over problems: answers to one problem are alike, so they are no independent trials, and a
bootstrap over answers would look surer than it is. They say nothing of how another training run would end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its lower and upper end."""

    mean: float
    low: float
    high: float


def pass_at_k(num_answers: int, num_passed: int, k: int = 1) -> float:
    """The unbiased estimate for one problem."""
    if not 1 <= k <= num_answers or not 0 <= num_passed <= num_answers:
        raise ValueError(
            "pass_at_k: 1 <= k <= num_answers and 0 <= num_passed <= num_answers must hold, "
            f"got k {k}, {num_answers} answers and {num_passed} passed"
        )
    return 1.0 - math.comb(num_answers - num_passed, k) / math.comb(num_answers, k)


def _resampled_means(values: Sequence[float], seed: int) -> npt.NDArray[np.float64]:
    places = np.random.default_rng(seed).integers(len(values), size=(_NUM_RESAMPLES, len(values)))
    means: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)[places].mean(axis=1)
    return means


def _require_some(op: str, num_values: int) -> None:
    if not num_values:
        raise ValueError(f"{op}: values must hold at least one problem, got none")


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of one number a problem, with the percentile bootstrap over problems."""
    _require_some("bootstrap_interval", len(values))
    tail = (1.0 - level) / 2
    low, high = np.quantile(_resampled_means(values, seed), [tail, 1.0 - tail])
    return Interval(mean=float(np.mean(values)), low=float(low), high=float(high))


def wilson_interval(num_passed: int, num_trials: int, *, level: float = 0.95) -> Interval:
    """A share of independent trials (one answer a problem), with Wilson's score interval."""
    _require_some("wilson_interval", num_trials)
    z = NormalDist().inv_cdf((1.0 + level) / 2)
    share = num_passed / num_trials
    scale = 1.0 + z * z / num_trials
    middle = (share + z * z / (2 * num_trials)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / num_trials + z * z / (4 * num_trials**2))
    return Interval(mean=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of second - first over the same problems, with the paired bootstrap."""
    if len(first) != len(second):
        raise ValueError(
            "paired_difference: first and second must be of the same problems, "
            f"got {len(first)} and {len(second)} values"
        )
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    return bootstrap_interval(gaps, level=level, seed=seed)
