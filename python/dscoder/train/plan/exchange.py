"""What dispatch and combine between expert ranks keep and allocate.

A token goes once to each rank that has one of its experts and takes a slot there. Worst case: every token of
every rank comes to this one, S = ranks * T slots. Exact: those that come, on average T * (ranks a token
goes to), the same everywhere under even routing. Each slot has K places for rows, M = S * K, used or not.
"""

import math
from dataclasses import dataclass

from dscoder.config import MoeConfig
from dscoder.train.plan.layout import Layout, ranks_on_a_node
from dscoder.train.plan.routing import expected_ranks

_WORD = 4  # bytes of an index or a weight


MOST_PEERS = 8  # ranks that the kernels over peer memory serve


def has_peer_transport(layout: Layout, per_node: int) -> bool:
    """Whether kernels move the tokens: where all ranks of every expert group are on one node."""
    on_node = ranks_on_a_node(layout.expert, stride=1, world=layout.world, per_node=per_node)
    return layout.expert == on_node <= MOST_PEERS


def buffer_bytes(
    moe: MoeConfig, layout: Layout, *, width: int, num_tokens: int, item: int, per_node: int
) -> int:
    """Of peer memory for slots both ways: rows and weights, and indices one way; kept for the whole run."""
    if layout.expert == 1 or not has_peer_transport(layout, per_node):
        return 0
    return layout.expert * num_tokens * (2 * item * width + 3 * _WORD * moe.num_topk)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """The sizes of one micro-batch in one layer, on one rank."""

    slots: int  # S
    rows: int  # M, allocated
    num_experts: int  # of this rank


def exchange_of(moe: MoeConfig, layout: Layout, num_tokens: int) -> Exchange:
    """Of `num_tokens` on each rank; without expert ranks the tokens are the slots."""
    if layout.expert == 1:
        slots = num_tokens
    elif layout.is_exact:
        slots = math.ceil(num_tokens * expected_ranks(moe, layout.expert))
    else:
        slots = num_tokens * layout.expert
    return Exchange(slots=slots, rows=slots * moe.num_topk, num_experts=moe.num_experts // layout.expert)
