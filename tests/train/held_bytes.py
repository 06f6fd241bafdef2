"""What a rank holds between the steps of a run, counted."""

import torch
from torch import Tensor

from dscoder.config import ModelConfig
from dscoder.config.plan import Precision
from dscoder.config.train import OptimizerConfig
from dscoder.runtime.mesh import arrange, open_mesh
from dscoder.train.optimizer import MasterAdamW
from tests.models.sharded import loss_of, sharded_model, tokens_of

STORED = {"bf16": torch.float32, "bf16_stochastic": torch.bfloat16}


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_bytes(
    model: ModelConfig, precision: Precision, layouts: list[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Of each layout (expert, replicate): weights, moments, and gradients before the optimizer's step."""
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in layouts:
            mesh = arrange(world, expert=expert, replicate=replicate)
            built, parts = sharded_model(model, mesh, dtype=torch.bfloat16, stored=STORED[precision])
            optimizer = MasterAdamW(built, OptimizerConfig(), mesh=mesh, rounding_seed=0)
            loss_of(built, tokens_of(0, model), num_batches=1).backward()
            moments = [moment for name, moment in optimizer.moments.items() if not name.endswith(".step")]
            gradients = [part.gradient() for part in parts.values()]
            found.append(
                (
                    num_bytes([part.local for part in parts.values()]),
                    num_bytes(moments),
                    num_bytes([gradient for gradient in gradients if gradient is not None]),
                )
            )
    return found
