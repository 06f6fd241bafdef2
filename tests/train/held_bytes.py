"""What a rank holds of a step, counted."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dscoder.config import ModelConfig
from dscoder.config.plan import Precision
from dscoder.config.train import OptimizerConfig
from dscoder.runtime.mesh import arrange, open_mesh
from dscoder.train.optimizer import MasterAdamW
from tests.models.sharded import loss_of, sharded_model, tokens_of

STORED = {"bf16": torch.float32, "bf16_stochastic": torch.bfloat16}


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes(model: nn.Module, optimizer: MasterAdamW) -> int:
    """All gradients that are there, wherever they are."""
    holders = [*model.parameters(), *optimizer.masters.values()]
    gradients = [holder.grad for holder in holders if holder.grad is not None]
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in gradients]
    return num_bytes([*locals_, *optimizer._rounded.gradients.values()])


def held_bytes(
    model: ModelConfig, precision: Precision, layouts: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Of each layout (expert, replicate): weights, moments, and gradients after two sums over ranks."""
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in layouts:
            mesh = arrange(world, expert=expert, replicate=replicate)
            built, parts = sharded_model(model, mesh, dtype=torch.bfloat16, stored=STORED[precision])
            optimizer = MasterAdamW(built, OptimizerConfig(), mesh=mesh, rounding_seed=0)
            for batch_idx in range(2):
                loss_of(built, tokens_of(batch_idx, model), num_batches=2).backward()
            moments = [moment for name, moment in optimizer.moments.items() if not name.endswith(".step")]
            found.append(
                (
                    num_bytes([part.local for part in parts.values()]),
                    num_bytes(moments),
                    gradient_bytes(built, optimizer),
                )
            )
    return found
