"""Initial weights: the values of the whole model, whatever part of it is held."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dscoder.models import Transformer, init_weights
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from tests.models.sharded import full, sharded_model, tiny

SEED = 11
LAYOUTS = {2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 1), (4, 1), (2, 2)]}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a parameter."""

    whole_shape: tuple[int, ...]
    local: Tensor
    first: int

    def take(self, full: Tensor) -> Tensor:
        return full[self.first : self.first + len(self.local)]


def whole(name: str, *, dtype: torch.dtype) -> dict[str, Tensor]:
    model = Transformer(tiny(name), dtype=dtype)
    init_weights(model, seed=SEED)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_rows_are_those_of_the_whole(name: str, dtype: torch.dtype) -> None:
    wanted = whole(name, dtype=dtype)
    model = Transformer(tiny(name), device="meta")
    for rank in range(3):
        held = {}
        for key, tensor in wanted.items():
            size = -(-len(tensor) // 3)
            rows = tensor[rank * size : (rank + 1) * size]
            held[key] = Rows(whole_shape=tuple(tensor.shape), local=torch.empty_like(rows), first=rank * size)
        init_weights(model, seed=SEED, parts=held)
        for key, part in held.items():
            assert torch.equal(part.local, part.take(wanted[key])), key


def test_float32_masters_of_a_bfloat16_run_begin_as_its_weights() -> None:
    wanted = whole("tiny_moe", dtype=torch.bfloat16)
    model = Transformer(tiny("tiny_moe"))
    init_weights(model, seed=SEED, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, wanted[key].float()), key


def check_layouts(num_ranks: int) -> None:
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in LAYOUTS[num_ranks]:
            mesh = arrange(world, expert=expert, replicate=replicate)
            for stored in (torch.float32, torch.bfloat16):
                check_values(mesh, stored)


def check_values(mesh: Mesh, stored: torch.dtype) -> None:
    """A run in bfloat16, with float32 masters or without, begins with the values of one process."""
    wanted = whole("tiny_moe", dtype=torch.bfloat16)
    model, held = sharded_model(tiny("tiny_moe"), mesh, dtype=torch.bfloat16, stored=stored)
    init_weights(model, seed=SEED, parts=held, dtype=torch.bfloat16)
    for key, part in held.items():
        assert torch.equal(full(part, part.local), wanted[key].to(stored)), (key, mesh.expert, mesh.replicate)


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_hold_the_weights_of_one_process_bit_for_bit(num_ranks: int) -> None:
    run_ranks(check_layouts, num_ranks, num_ranks=num_ranks)
