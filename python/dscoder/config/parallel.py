"""How one training run is spread over ranks, and what it trades for memory."""

import math
from dataclasses import dataclass
from typing import Literal

from dscoder.config.model import ModelConfig

# What is computed twice to keep less; selective: all but the routed experts.
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The layout of a run under torchrun.

    Without torchrun `expert` and `replicate` must be 1, and of the rest `recompute` and `compile` alone
    count.
    World = replicate x shard, and every rank has its own data. Parameters are sharded over the ranks of a
    replica; the experts are first divided among the `expert` ranks of a group.
    """

    expert: int = 1  # ranks that hold different experts and exchange tokens
    replicate: int = 1  # whole copies of the sharded model
    recompute: Recompute = "none"
    compile: Literal["none", "dense"] = "none"  # dense: attention, norms and MLPs; never the routed experts
    reshard_after_forward: bool = True  # free a layer's gathered weights until its backward pass
    sums_each_batch: bool = False  # sum gradients over ranks after each micro-batch: keeps parts, not wholes
    transport: Literal["auto", "peer", "collective"] = "auto"  # of tokens between expert ranks
    exact: bool | None = None  # receive buffers of the size that comes in; None: on the CPU alone
    timeout: float = 600.0  # seconds before a device's wait for other ranks ends with an error

    def __post_init__(self) -> None:
        for name, value in (("expert", self.expert), ("replicate", self.replicate)):
            if value < 1:
                raise ValueError(f"ParallelConfig: {name} must be >= 1, got {value}")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"ParallelConfig: timeout must be positive, got {self.timeout}")


def check_experts_divide(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a number of expert ranks that cannot share the experts of `model` out.

    Raises:
        ValueError: there are no experts, they do not divide evenly, or a routing group and a rank's experts
            overlap without one holding the other: a token limited to a few groups would go to many ranks.
    """
    expert, moe = parallel.expert, model.moe
    if expert == 1:
        return
    if moe is None:
        raise ValueError(f"parallel: expert must be 1 for a model without experts, got {expert}")
    if moe.num_experts % expert:
        raise ValueError(
            f"parallel: expert must divide the model's num_experts = {moe.num_experts}, got {expert}"
        )
    if moe.num_groups % expert and expert % moe.num_groups:
        raise ValueError(
            f"parallel: expert must divide the model's num_groups = {moe.num_groups} or be a multiple of it, "
            f"got {expert}"
        )
