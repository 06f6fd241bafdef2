"""What the tests of sharded models share: tiny models, the same on one process and on every mesh."""

from dataclasses import replace

import torch
from torch import Tensor

from dscoder import ops
from dscoder.config import BalanceConfig, ModelConfig, preset
from dscoder.config.parallel import ParallelConfig
from dscoder.models import Transformer, init_weights
from dscoder.models.sharding import Part, materialise_shards, parts, shard_model
from dscoder.runtime.mesh import Mesh
from tests.whole import whole_of

MAX_TOKENS = 64


def tiny(name: str) -> ModelConfig:
    """A preset made smaller: two layers, a few widths; with experts, four of each rank's at most."""
    config = preset(name)
    config = replace(config, num_layers=2, vocab_size=128, width=32, mlp_width=48, init_std=0.2)
    if config.moe is None:
        return config
    moe = replace(
        config.moe,
        num_experts=8,
        expert_width=16,
        num_groups=4,
        num_groups_kept=2,
        num_topk=3,
        balance=BalanceConfig(expert=0.1, device=0.2, communication=0.3),
    )
    return replace(config, moe=moe)


def whole_model(config: ModelConfig) -> Transformer:
    """The model on one process."""
    model = Transformer(config)
    init_weights(model, seed=3)
    return model


def sharded_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
) -> tuple[Transformer, dict[str, Part]]:
    """The same model on a mesh, made on the meta device, and its parts."""
    group = None
    if mesh.expert > 1 and config.moe is not None:
        group = ops.ExpertParallel(
            mesh.expert_group,
            num_experts=config.moe.num_experts,
            hidden=config.width,
            max_tokens=MAX_TOKENS,
            num_topk=config.moe.num_topk,
            dtype=dtype,
        )
    model = Transformer(config, device="meta", dtype=stored, expert_parallel=group)
    shard_model(model, mesh, dtype=dtype, config=ParallelConfig() if parallel is None else parallel)
    materialise_shards(model, device=mesh.device)
    weights = dict(whole_model(config).named_parameters())
    found = parts(model, mesh)
    with torch.no_grad():
        for name, part in found.items():
            part.local.copy_(part.take(weights[name]))
    return model, found


def tokens_of(batch_idx: int, config: ModelConfig) -> Tensor:
    """int64 [2, 7]: micro-batch number `batch_idx`."""
    generator = torch.Generator().manual_seed(batch_idx)
    return torch.randint(config.vocab_size, (2, 7), generator=generator)


def loss_of(model: Transformer, tokens_BS: Tensor, *, num_batches: int) -> Tensor:
    """A sum over tokens and balance terms, divided beforehand by what all micro-batches have."""
    tokens_BS = tokens_BS.to(model.embed.weight.device)
    features = model.features(tokens_BS)
    logits = features.hidden_BSD.flatten(0, 1) @ model.head.weight.t()
    targets_T = tokens_BS.flatten().roll(1)
    total = torch.nn.functional.cross_entropy(logits.float(), targets_T, reduction="sum")
    share = len(tokens_BS) / (2 * num_batches)
    return total / (14 * num_batches) + features.balance * share


def whole_gradients(config: ModelConfig, num_batches: int) -> dict[str, Tensor]:
    """The gradient of all micro-batches on one process."""
    model = whole_model(config)
    for batch_idx in range(num_batches):
        loss_of(model, tokens_of(batch_idx, config), num_batches=num_batches).backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def full(part: Part, tensor: Tensor | None) -> Tensor:
    """The whole of which `tensor` is this rank's part; a collective."""
    assert tensor is not None
    return whole_of(part.whole(tensor))
