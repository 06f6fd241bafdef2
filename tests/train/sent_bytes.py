"""What sharded weights and gradients send in a step, counted at the collectives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dscoder.config import ModelConfig
from dscoder.config.parallel import ParallelConfig, Recompute
from dscoder.models import Transformer
from dscoder.models.transformer import Layer
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.train.plan.layout import Layout
from tests.models.sharded import loss_of, sharded_model, tokens_of

Received = dict[str, float]  # bytes, by what they are for

# What FSDP calls, in one version of torch or another.
_NAMES = {
    "all_gather_into_tensor": "gather",
    "all_gather_single": "gather",
    "reduce_scatter_tensor": "reduce",
    "reduce_scatter_single": "reduce",
}


@contextmanager
def counted(found: Received) -> Iterator[None]:
    """Add what collectives of weights and gradients bring to this rank."""
    before: dict[str, Callable[..., Any]] = {name: vars(dist)[name] for name in _NAMES if name in vars(dist)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            whole = max(tensors, key=Tensor.numel)
            size = dist.get_world_size(kwargs["group"])
            found[_NAMES[name]] += whole.numel() * whole.element_size() * (1 - 1 / size)
            return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def _pair_bytes(model: Transformer, recompute: Recompute) -> float:
    """What all exchanges of a token with one rank that holds its experts come to, forward and backward."""
    layer = model.layers[-1]
    assert isinstance(layer, Layer)
    if layer.moe.expert_parallel is None:
        return 0.0
    seen = layer.moe.expert_parallel.statistics()
    num_dispatches = 2 if recompute == "full" else 1  # of each token
    return (seen.dispatch_bytes + seen.combine_bytes) * num_dispatches / seen.num_pairs


def _received(model: ModelConfig, mesh: Mesh, layout: Layout, num_rounds: int) -> Received:
    parallel = ParallelConfig(reshard_after_forward=layout.reshard)
    built, _ = sharded_model(model, mesh, dtype=torch.bfloat16, parallel=parallel)
    for layer in built.layers:
        assert isinstance(layer, Layer)
        layer.recompute = layout.recompute
    found = {"gather": 0.0, "reduce": 0.0}
    for number in range(num_rounds):
        built.set_requires_gradient_sync(number == num_rounds - 1 or layout.sums_each_batch)
        with counted(found):
            loss_of(built, tokens_of(number, model), num_batches=num_rounds).backward()
    return found | {"pair": _pair_bytes(built, layout.recompute)}


def received_on_layouts(model: ModelConfig, layouts: list[Layout], num_rounds: int) -> list[Received]:
    """Of `num_rounds` micro-batches in each layout."""
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        return [
            _received(model, arrange(world, expert=one.expert, replicate=one.replicate), one, num_rounds)
            for one in layouts
        ]
