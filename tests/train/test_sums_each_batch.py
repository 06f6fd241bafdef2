"""Gradients summed over ranks after each micro-batch are those of the step, and lie there in parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dscoder.config import ModelConfig
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import Batch
from dscoder.models import Transformer
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from dscoder.train import loop
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.ranks import Ranks
from tests.models.sharded import full, sharded_model, tiny, tokens_of, whole_model
from tests.train.held_bytes import gradient_bytes

pytestmark = pytest.mark.dist

NUM_BATCHES = 3  # of each rank
CONFIG = OptimizerConfig(eps=1e-2)  # a step then follows the gradient, not its sign


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What one step did on a rank."""

    norm: float  # of the gradient
    weights: dict[str, Tensor]  # whole
    seen: list[int]  # bytes of gradients behind each micro-batch's backward pass
    held: int  # elements of the weights that the rank holds


def batch_of(number: int, config: ModelConfig) -> Batch:
    tokens_BS = tokens_of(number, config)
    num_rows, length = tokens_BS.shape
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS.roll(-1, dims=1),
        cu_seqlens=torch.arange(num_rows + 1, dtype=torch.int32) * length,
        window_idx=(number,),
    )


def move(model: Transformer, optimizer: MasterAdamW, numbers: Sequence[int], ranks: Ranks) -> float:
    batches = [batch_of(number, model.config) for number in numbers]
    return train_step(model, optimizer, batches, lr=0.1, step=0, ranks=ranks).grad_norm


def moved_alone(name: str, num_ranks: int) -> tuple[float, dict[str, Tensor]]:
    model = whole_model(tiny(name))
    norm = move(model, MasterAdamW(model, CONFIG), range(num_ranks * NUM_BATCHES), Ranks())
    return norm, {key: parameter.detach() for key, parameter in model.named_parameters()}


def moved_spread(name: str, mesh: Mesh, stored: torch.dtype = torch.float32) -> Moved:
    model, parts = sharded_model(tiny(name), mesh, dtype=stored, stored=stored)
    optimizer = MasterAdamW(model, CONFIG, mesh=mesh, rounding_seed=0)
    seen: list[int] = []
    backward = loop._backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        figures = backward(*args, **kwargs)
        seen.append(gradient_bytes(model, optimizer))
        return figures

    numbers = range(mesh.rank, mesh.world_size * NUM_BATCHES, mesh.world_size)
    with patch.object(loop, "_backward", watched):
        norm = move(model, optimizer, numbers, Ranks(mesh, sums_each_batch=True))
    return Moved(
        norm=norm,
        weights={key: full(part, part.local) for key, part in parts.items()},
        seen=seen,
        held=sum(part.local.numel() for part in parts.values()),
    )


def moved_on_layouts(name: str, layouts: list[tuple[int, int]]) -> list[Moved]:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        return [moved_spread(name, arrange(world, expert=e, replicate=r)) for e, r in layouts]


@pytest.mark.parametrize(
    ("name", "num_ranks", "layouts"),
    [("tiny_dense", 2, [(1, 1)]), ("tiny_moe", 2, [(2, 1), (1, 2)]), ("tiny_moe", 4, [(2, 2), (2, 1)])],
)
def test_a_step_is_that_of_one_process(name: str, num_ranks: int, layouts: list[tuple[int, int]]) -> None:
    wanted_norm, wanted = moved_alone(name, num_ranks)
    found = run_ranks(moved_on_layouts, name, layouts, num_ranks=num_ranks)[0]
    for (_, replicate), moved in zip(layouts, found, strict=True):
        assert moved.norm == pytest.approx(wanted_norm, rel=1e-5)
        torch.testing.assert_close(moved.weights, wanted, rtol=1e-4, atol=1e-5)
        # Parts are there once after each batch; replicas sum theirs, which FSDP keeps, with the last.
        first = 4 * moved.held if replicate == 1 else 0
        assert moved.seen == [first] * (NUM_BATCHES - 1) + [4 * moved.held]


def moved_in_bfloat16() -> Moved:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as mesh:
        return moved_spread("tiny_dense", mesh, torch.bfloat16)


def test_bfloat16_parameters_add_up_too() -> None:
    wanted_norm, _ = moved_alone("tiny_dense", 2)
    for moved in run_ranks(moved_in_bfloat16, num_ranks=2):
        assert moved.norm == pytest.approx(wanted_norm, rel=0.02)
        # In float32, and nothing beside that.
        assert moved.seen == [4 * moved.held] * NUM_BATCHES
