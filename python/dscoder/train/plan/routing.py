"""How many ranks a token goes to, on average.

A token's experts are drawn one after another as the gate draws them if scores are independent: in the order
of a random permutation of all experts, those of groups that were not kept left out. The best expert of a
group decides whether it is kept, so the first `num_groups_kept` groups that the permutation meets are the
kept ones, and before the last of them is met nothing is left out. That makes the draw a chain over (groups
met, ranks met), which is summed here exactly. Trained gates may spread more or less.
"""

from collections import defaultdict
from functools import cache

from dscoder.config import MoeConfig

State = tuple[int, int]  # groups met, ranks met
Chances = dict[State, float]


@cache
def expected_ranks(moe: MoeConfig, num_ranks: int) -> float:
    """Distinct ranks among a token's K experts, on `num_ranks` that hold E / num_ranks neighbours each.

    Ranks and routing groups must nest, as `check_experts_divide` demands.
    """
    num_groups, num_kept = moe.num_groups, moe.num_groups_kept
    if num_kept == num_groups:  # nothing is left out: any groups that nest do
        num_groups = num_kept = num_ranks
    chances: Chances = {(0, 0): 1.0}
    for num_drawn in range(moe.num_topk):
        following: Chances = defaultdict(float)
        for (groups, ranks), chance in chances.items():
            counts = _candidates(
                groups,
                ranks,
                num_drawn,
                num_experts=moe.num_experts,
                num_groups=num_groups,
                num_kept=num_kept,
                num_ranks=num_ranks,
            )
            _spread(chance, counts, following)
        chances = following
    return sum(ranks * chance for (_, ranks), chance in chances.items())


def _spread(chance: float, counts: dict[State, int], onto: Chances) -> None:
    """Add to each next state its part of `chance`."""
    total = sum(counts.values())
    for state, count in counts.items():
        onto[state] += chance * count / total


def _candidates(
    groups: int,
    ranks: int,
    num_drawn: int,
    *,
    num_experts: int,
    num_groups: int,
    num_kept: int,
    num_ranks: int,
) -> dict[State, int]:
    """Experts that may be drawn next, by the (groups, ranks) that will have been met then."""
    group_width, rank_width = num_experts // num_groups, num_experts // num_ranks
    if num_ranks >= num_groups:  # a group is spread over whole ranks
        met = groups * group_width
        counts = {
            (groups, ranks): ranks * rank_width - num_drawn,
            (groups, ranks + 1): met - ranks * rank_width,
            (groups + 1, ranks + 1): num_experts - met,
        }
    else:  # a rank holds whole groups
        counts = {
            (groups, ranks): groups * group_width - num_drawn,
            (groups + 1, ranks): ranks * rank_width - groups * group_width,
            (groups + 1, ranks + 1): num_experts - ranks * rank_width,
        }
    return {state: count for state, count in counts.items() if count and state[0] <= num_kept}
