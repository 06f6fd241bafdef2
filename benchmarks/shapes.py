"""Sizes that op benchmarks share: the expert layers of the published models, and what fits this device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.peers import Peer, peers
from dscoder.testing.cases import ROUTINGS
from dscoder.testing.results import measured_device

DEVICE = measured_device()
IS_ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if IS_ON_GPU else torch.float32  # of activations
ITEM = DTYPE.itemsize

DECODE = 128  # tokens of a step that adds one to each of 128 sequences
TOKENS = 8192 if IS_ON_GPU else 512  # of a usual batch
MANY_TOKENS = 131072 if IS_ON_GPU else 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayer:
    """What routing and its data movement depend on."""

    width: int
    expert_width: int
    num_experts: int
    num_topk: int = 6
    num_groups: int = 1
    num_groups_kept: int = 1
    scale: float = 1.0

    def shape(self, num_tokens: int, *, width: bool = True) -> str:
        """As a record holds it."""
        middle = f"D={self.width} " if width else ""
        groups = f" G={self.num_groups}/{self.num_groups_kept}" if self.num_groups > 1 else ""
        return f"T={num_tokens} {middle}E={self.num_experts} K={self.num_topk}{groups}"


LAYERS = {
    "v2_lite": ExpertLayer(width=2048, expert_width=1408, num_experts=64),
    "v2": ExpertLayer(
        width=5120, expert_width=1536, num_experts=160, num_groups=8, num_groups_kept=3, scale=16.0
    ),
}


def routed_cases(
    *steps: str, kinds: Sequence[str] = ROUTINGS, many: bool = False
) -> list[tuple[str, int, str, str]]:
    """(model, tokens, routing, step): every kind of routing at the usual batch, uniform at the other sizes.

    What matters most comes first, for runs that are cut: both models at the usual batch, uniform before the
    other routings. Forward and backward in one are the sum of both: at the usual batch and uniform routing
    alone.
    """
    sizes = [*((TOKENS, kind) for kind in kinds), (DECODE, "uniform")]
    if many:
        sizes.append((MANY_TOKENS, "uniform"))
    return [
        (model, num_tokens, kind, step)
        for num_tokens, kind in sizes
        for model in LAYERS
        for step in steps
        if step != "forward + backward" or (num_tokens, kind) == (TOKENS, "uniform")
    ]


def peers_of(op: str, step: str, num_tokens: int = TOKENS) -> dict[str, Peer]:
    """The peers here; torch.compile, which takes seconds for each shape, at the usual batch alone."""
    found = peers(op, step, DEVICE)
    return {name: peer for name, peer in found.items() if name != "torch.compile" or num_tokens == TOKENS}
