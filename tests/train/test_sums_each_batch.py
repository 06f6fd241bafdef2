"""Gradients summed over ranks after each micro-batch are those of the step, and lie there in parts."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dscoder.config import ModelConfig
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import Batch
from dscoder.models import Transformer
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from dscoder.train.loop import train_step
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.ranks import Ranks
from tests.models.sharded import sharded_model, tiny, tokens_of, whole_model

pytestmark = pytest.mark.dist

NUM_BATCHES = 3  # of each rank
CONFIG = OptimizerConfig(eps=1e-2)  # a step then follows the gradient, not its sign


class Watched(MasterAdamW):
    """Writes down how many parameters have a gradient whenever gradients are collected."""

    seen: list[int]

    def collect(self) -> None:
        self.seen.append(sum(part.parameter.grad is not None for part in self._parts.values()))
        super().collect()


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


def moved_spread(
    name: str, mesh: Mesh, stored: torch.dtype = torch.float32
) -> tuple[float, dict[str, Tensor], list[int], int]:
    """The gradient's norm, the weights, what was seen at each collection, and the number of parameters."""
    model, parts = sharded_model(tiny(name), mesh, dtype=stored, stored=stored)
    optimizer = Watched(model, CONFIG, mesh=mesh, rounding_seed=0)
    optimizer.seen = []
    numbers = range(mesh.rank, mesh.world_size * NUM_BATCHES, mesh.world_size)
    norm = move(model, optimizer, numbers, Ranks(mesh, sums_each_batch=True))
    weights = {}
    for key, part in parts.items():
        whole = part.whole(part.local)
        assert isinstance(whole, DTensor)
        weights[key] = whole.full_tensor()
    return norm, weights, optimizer.seen, len(parts)


def moved_on_layouts(
    name: str, layouts: list[tuple[int, int]]
) -> list[tuple[float, dict[str, Tensor], list[int], int]]:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        return [moved_spread(name, arrange(world, expert=e, replicate=r)) for e, r in layouts]


@pytest.mark.parametrize(
    ("name", "num_ranks", "layouts"),
    [("tiny_dense", 2, [(1, 1)]), ("tiny_moe", 2, [(2, 1), (1, 2)]), ("tiny_moe", 4, [(2, 2), (2, 1)])],
)
def test_a_step_is_that_of_one_process(name: str, num_ranks: int, layouts: list[tuple[int, int]]) -> None:
    wanted_norm, wanted = moved_alone(name, num_ranks)
    found = run_ranks(moved_on_layouts, name, layouts, num_ranks=num_ranks)[0]
    for (_, replicate), (norm, weights, seen, num_parameters) in zip(layouts, found, strict=True):
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        torch.testing.assert_close(weights, wanted, rtol=1e-4, atol=1e-5)
        # Parts are there after each batch; replicas sum theirs with the last.
        first = num_parameters if replicate == 1 else 0
        assert seen[:NUM_BATCHES] == [first] * (NUM_BATCHES - 1) + [num_parameters]


def norms_in_bfloat16() -> float:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as mesh:
        return moved_spread("tiny_dense", mesh, torch.bfloat16)[0]


def test_bfloat16_parameters_add_up_too() -> None:
    wanted_norm, _ = moved_alone("tiny_dense", 2)
    assert run_ranks(norms_in_bfloat16, num_ranks=2) == pytest.approx([wanted_norm] * 2, rel=0.02)
