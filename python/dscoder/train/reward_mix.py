"""One reward from those of several functions, some of which may be missing."""

import math
from collections.abc import Iterable, Mapping, Sequence

from dscoder.train.advantage import LARGEST_REWARD, group_mean


def mix(
    values: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]
) -> tuple[float | None, ...]:
    """One reward an answer: the weighted sum, a missing value counted as the mean of the group's others.

    A function without any value in the group is left out of the whole group; an answer without any value gets
    None, and so does one whose sum is too large to be compared.
    """
    means = {name: group_mean(there) for name, by_answer in values.items() if (there := told(by_answer))}
    rows = zip(*values.values(), strict=True)
    return tuple(_mixed(dict(zip(values, row, strict=True)), means, weights) for row in rows)


def told(values: Iterable[float | None]) -> list[float]:
    """Those that are there."""
    return [value for value in values if value is not None]


def _mixed(
    row: Mapping[str, float | None], means: Mapping[str, float], weights: Mapping[str, float]
) -> float | None:
    if not told(row.values()):
        return None
    filled = {name: means[name] if (value := row[name]) is None else value for name in means}
    parts = [weights[name] * value for name, value in filled.items()]
    if any(abs(part) > LARGEST_REWARD for part in parts):  # their sum may be no number
        return None
    mixed = math.fsum(parts)
    return mixed if abs(mixed) <= LARGEST_REWARD else None
