"""A sharded model computes what the whole one computes, whatever the layout."""

import pytest
import torch
from torch import Tensor

from dscoder.models import Transformer
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from tests.models.sharded import full, loss_of, sharded_model, tiny, tokens_of, whole_gradients

pytestmark = pytest.mark.dist


def add_gradients(model: Transformer, mesh: Mesh, num_batches: int) -> None:
    """Micro-batch i is rank (i mod world)'s; who has none left takes one without sequences."""
    num_rounds = -(-num_batches // mesh.world_size)
    for turn in range(num_rounds):
        batch_idx = turn * mesh.world_size + mesh.rank
        tokens_BS = tokens_of(batch_idx, model.config)
        if batch_idx >= num_batches:
            tokens_BS = tokens_BS[:0]
        model.set_requires_gradient_sync(turn == num_rounds - 1)
        loss_of(model, tokens_BS, num_batches=num_batches).backward()


def gradients_of_layouts(
    name: str, layouts: list[tuple[int, int]], num_batches: int
) -> list[dict[str, Tensor]]:
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in layouts:
            mesh = arrange(world, expert=expert, replicate=replicate)
            model, parts = sharded_model(tiny(name), mesh)
            add_gradients(model, mesh, num_batches)
            found.append({key: full(part, part.gradient()) for key, part in parts.items()})
    return found


@pytest.mark.parametrize(
    ("num_ranks", "name", "layouts"),
    [
        (2, "tiny_dense", [(1, 1), (1, 2)]),
        (2, "tiny_moe", [(1, 1), (2, 1)]),
        (4, "tiny_moe", [(2, 1), (2, 2), (4, 1)]),
    ],
)
def test_gradients_are_those_of_one_process(
    num_ranks: int, name: str, layouts: list[tuple[int, int]]
) -> None:
    num_batches = 3 * num_ranks - 1
    wanted = whole_gradients(tiny(name), num_batches)
    for by_layout in run_ranks(gradients_of_layouts, name, layouts, num_batches, num_ranks=num_ranks):
        for gradients in by_layout:
            # float32 sums in another order
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)
