"""Bytes that a step sends between GPUs, split into those inside a node and those across nodes.

Collectives are counted as rings (or trees of rings) move them, which is also the least possible: a rank
receives all that it does not have, and a node receives from outside, once, what none of its ranks has. Where
groups do not fit into nodes, the ranks with the fewest of their group on the node are told of: others wait.
"""

from dataclasses import dataclass

from dscoder.config import ModelConfig, MoeConfig
from dscoder.train.plan.exchange import has_peer_transport
from dscoder.train.plan.layout import Layout, ranks_on_a_node
from dscoder.train.plan.routing import expected_ranks
from dscoder.train.plan.weights import Weights, dense_numel, held_numel, local_experts_numel

_F32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that one GPU receives; it sends as many."""

    link: float = 0.0  # from GPUs of its node
    network: float = 0.0  # from other nodes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(link=self.link + other.link, network=self.network + other.network)

    def times(self, factor: float) -> "Traffic":
        """So many of it."""
        return Traffic(link=self.link * factor, network=self.network * factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks that communicate: `size` of them, `on_node` of these on one node."""

    size: int
    on_node: int

    def gather(self, num_bytes: float) -> Traffic:
        """Of putting `num_bytes` together from parts on every rank, or of summing as many into parts."""
        network = num_bytes * (1 - self.on_node / self.size) / self.on_node
        return Traffic(link=num_bytes * (1 - 1 / self.size) - network, network=network)

    def scatter(self, num_bytes: float, num_ranks: float) -> Traffic:
        """Of `num_bytes` sent to each of `num_ranks` ranks, any of the group being as likely as another."""
        to_each = num_bytes * num_ranks / self.size
        return Traffic(link=to_each * (self.on_node - 1), network=to_each * (self.size - self.on_node))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTraffic:
    """Of one step, on one GPU."""

    gather: Traffic  # weights, before they are used
    reduce: Traffic  # gradients, over the ranks of a replica
    replicas: Traffic  # gradients, over replicas
    exchange: Traffic  # tokens to their experts and back, and their gradients


def _exchange_traffic(
    moe: MoeConfig, layout: Layout, *, width: int, num_tokens: int, item: int, per_node: int
) -> Traffic:
    """Of one layer's forward and backward, from the `num_tokens` of each rank.

    Four ways: dispatch, combine, and back again the gradient of each. With a row its choices travel to the
    experts, and the gradients of their weights back. A forward that is computed again dispatches again.
    """
    if layout.expert == 1:
        return Traffic()
    group = _group(layout.expert, 1, layout, per_node)
    row, weights = item * width, _F32 * moe.num_topk
    choices = 2 * weights  # an index and a weight each
    num_bytes = (row + choices) + row + row + (row + weights)
    if layout.recompute == "full":
        num_bytes += row + choices
    # Collectives of a fixed size carry a row for every token to every rank, padding where it does not go.
    is_padded = not layout.is_exact and not has_peer_transport(layout, per_node)
    num_ranks = layout.expert if is_padded else expected_ranks(moe, layout.expert)
    return group.scatter(num_tokens * num_bytes, num_ranks)


def _group(size: int, stride: int, layout: Layout, per_node: int) -> Group:
    on_node = ranks_on_a_node(size, stride=stride, world=layout.world, per_node=per_node)
    return Group(size=size, on_node=on_node)


def _moves(layout: Layout, weights: Weights, per_node: int, num_bytes: int) -> tuple[Traffic, Traffic]:
    """Of gathering every parameter once at `num_bytes` each: the layers, and the root."""
    shard = _group(layout.shard, 1, layout, per_node)
    expert_shard = _group(layout.expert_shard, layout.expert, layout, per_node)
    layers = Traffic()
    for kind in weights.kinds:
        size = kind.count * num_bytes
        layers += shard.gather(size * dense_numel(kind.unit))
        layers += expert_shard.gather(size * local_experts_numel(kind.unit, layout))
    return layers, shard.gather(num_bytes * dense_numel(weights.root))


def _replica_traffic(layout: Layout, weights: Weights, per_node: int) -> Traffic:
    """Of summing a rank's part of the gradients over replicas: reduced into parts, then gathered."""
    group = _group(layout.replicate, layout.shard, layout, per_node)
    held = weights.sum_over(lambda unit: held_numel(unit, layout))
    return group.gather(_F32 * held).times(2)


def step_traffic(
    model: ModelConfig,
    layout: Layout,
    weights: Weights,
    *,
    per_node: int,
    num_rounds: int,
    num_tokens: int,
    item: int,
) -> StepTraffic:
    """Of `num_rounds` micro-batches of `num_tokens` on each rank, with weights of `item` bytes."""
    layers, root = _moves(layout, weights, per_node, item)
    num_gathers = 2 if layout.reshard else 1
    summed_layers, summed_root = _moves(layout, weights, per_node, _F32)
    exchange = Traffic()
    if model.moe is not None:
        exchange = _exchange_traffic(
            model.moe, layout, width=model.width, num_tokens=num_tokens, item=item, per_node=per_node
        )
    num_moe_layers = sum(kind.count for kind in weights.kinds if kind.unit.experts)
    return StepTraffic(
        gather=(layers.times(num_gathers) + root).times(num_rounds),
        reduce=(summed_layers + summed_root).times(num_rounds if layout.sums_each_batch else 1),
        replicas=_replica_traffic(layout, weights, per_node),
        exchange=exchange.times(num_moe_layers * num_rounds),
    )
