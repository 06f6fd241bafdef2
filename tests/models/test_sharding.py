"""A sharded model computes what the whole one computes, whatever the layout."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dscoder.runtime.mesh import arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from tests.models.sharded import loss_of, sharded_model, tiny, tokens_of, whole_gradients, whole_model

pytestmark = pytest.mark.dist


def gradients_of_layouts(
    name: str, layouts: list[tuple[int, int]], num_batches: int
) -> list[dict[str, Tensor]]:
    config = tiny(name)
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in layouts:
            mesh = arrange(world, expert=expert, replicate=replicate)
            model, parts = sharded_model(config, mesh)
            rounds = -(-num_batches // mesh.world_size)
            for turn in range(rounds):
                batch_idx = turn * mesh.world_size + mesh.rank
                model.set_requires_gradient_sync(turn == rounds - 1)
                tokens_BS = tokens_of(batch_idx, config)
                if batch_idx >= num_batches:
                    tokens_BS = tokens_BS[:0]
                loss_of(model, tokens_BS, num_batches=num_batches).backward()
            gradients = {}
            for name, part in parts.items():
                gradient = part.gradient()
                assert gradient is not None
                whole = part.whole(gradient)
                assert isinstance(whole, DTensor)
                gradients[name] = whole.full_tensor()
            found.append(gradients)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "name", "layouts"),
    [
        (2, "tiny_dense", [(1, 1), (1, 2)]),
        (2, "tiny_moe", [(1, 1), (2, 1)]),
        (4, "tiny_moe", [(2, 1), (2, 2), (4, 1)]),
    ],
)
def test_gradients_are_those_of_one_process(num_ranks, name, layouts) -> None:
    wanted = whole_gradients(tiny(name), 3 * num_ranks - 1)
    results = run_ranks(gradients_of_layouts, name, layouts, 3 * num_ranks - 1, num_ranks=num_ranks)
    for by_layout in results:
        for gradients in by_layout:
            assert gradients.keys() == wanted.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient, wanted[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
