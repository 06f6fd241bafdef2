"""How a run may be spread over GPUs: all layouts that a model, a batch and a cluster allow."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import get_args

from dscoder.config import ModelConfig
from dscoder.config.parallel import ParallelConfig, Recompute, check_experts_divide

RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)

_LARGEST_MICRO = 16  # windows; kernels are as good with fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way; the ranks of a group are neighbours: expert innermost, then expert_shard, then replicate."""

    replicate: int = 1
    expert_shard: int = 1
    expert: int = 1
    micro: int = 1  # windows that a rank computes at once
    recompute: Recompute = "none"
    reshard: bool = True  # gathered weights are freed between forward and backward
    is_exact: bool = False  # exchange buffers of the size that comes in
    sums_each_batch: bool = False  # gradients are summed over ranks after each micro-batch, not the last

    @property
    def shard(self) -> int:
        """Ranks that share the dense parameters out."""
        return self.expert_shard * self.expert

    @property
    def world(self) -> int:
        """All ranks."""
        return self.replicate * self.shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The windows of a step and how they come to the ranks."""

    sequences: int
    length: int  # tokens of a window

    def rounds(self, layout: Layout) -> int:
        """Micro-batches that the busiest rank computes in a step; the others wait in the last round."""
        return -(-self.num_micros(layout.micro) // layout.world)

    def num_micros(self, micro: int) -> int:
        """Micro-batches of a step, of all ranks."""
        return -(-self.sequences // micro)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What is fixed of a layout; None is tried in every form."""

    expert: int | None = None
    replicate: int | None = None
    micro: int | None = None
    recompute: Recompute | None = None


@cache
def ranks_on_a_node(size: int, *, stride: int, world: int, per_node: int) -> int:
    """The fewest ranks of a group that share a node, over all groups of a world.

    Groups have `size` ranks, `stride` apart, and follow each other; where they do not fit into nodes of
    `per_node` neighbouring ranks, some have few ranks on some node.
    """
    fewest = size
    for group_idx in range(world // size):
        first = group_idx // stride * size * stride + group_idx % stride
        on_nodes = Counter(rank // per_node for rank in range(first, first + size * stride, stride))
        fewest = min(fewest, *on_nodes.values())
    return fewest


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _expert_sizes(model: ModelConfig, num_ranks: int, fixed: int | None) -> list[int]:
    """Sizes of expert groups that share the experts out; ValueError for a fixed one that does not."""
    if fixed is not None:
        check_experts_divide(model, ParallelConfig(expert=fixed))
        return [fixed]
    sizes = []
    for size in _divisors(num_ranks):
        try:
            check_experts_divide(model, ParallelConfig(expert=size))
        except ValueError:
            continue
        sizes.append(size)
    return sizes


def _micros(batch: Batch, num_ranks: int, fixed: int | None) -> Sequence[int]:
    """Sizes that cut a rank's windows evenly, or all where the ranks' windows differ in number."""
    if fixed is not None:
        return [fixed]
    share, rest = divmod(batch.sequences, num_ranks)
    if share and not rest:
        return [size for size in _divisors(share) if size <= _LARGEST_MICRO]
    return range(1, min(max(1, share), _LARGEST_MICRO) + 1)


def layouts(model: ModelConfig, batch: Batch, *, num_ranks: int, fixed: Choices) -> Iterator[Layout]:
    """Every layout of `num_ranks`; ValueError where what is fixed does not go into them."""
    experts = _expert_sizes(model, num_ranks, fixed.expert)
    replicates = _divisors(num_ranks) if fixed.replicate is None else [fixed.replicate]
    pairs = [
        (expert, replicate)
        for expert, replicate in product(experts, replicates)
        if num_ranks % (expert * replicate) == 0
    ]
    if not pairs:
        sizes = {"expert": fixed.expert, "replicate": fixed.replicate}
        given = {name: size for name, size in sizes.items() if size is not None}
        raise ValueError(
            f"plan: gpus must be a multiple of {' * '.join(given)}, "
            f"got {num_ranks} and {' * '.join(str(size) for size in given.values())}"
        )
    recomputes = RECOMPUTES if fixed.recompute is None else (fixed.recompute,)
    micros = _micros(batch, num_ranks, fixed.micro)
    if batch.num_micros(min(micros)) < num_ranks:
        raise ValueError(
            f"plan: batch must have a micro-batch for each of {num_ranks} GPUs, "
            f"got {batch.sequences} windows in micro-batches of {min(micros)}"
        )
    for (expert, replicate), micro, recompute in product(pairs, micros, recomputes):
        is_one_round = batch.num_micros(micro) <= num_ranks
        forms = product(
            (True, False),
            (False, True) if expert > 1 else (False,),
            (False,) if is_one_round else (False, True),
        )
        for reshard, is_exact, sums_each_batch in forms:
            yield Layout(
                replicate=replicate,
                expert_shard=num_ranks // (expert * replicate),
                expert=expert,
                micro=micro,
                recompute=recompute,
                reshard=reshard,
                is_exact=is_exact,
                sums_each_batch=sums_each_batch,
            )
