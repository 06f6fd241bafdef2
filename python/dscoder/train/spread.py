"""The model of a run whose ranks share it: built in parts from nothing or from files, and back to files.

No rank ever holds the whole of it. With float32 masters the masters are the parameters, which are rounded to
the type of the run when they are gathered; what it computes is what one process with a rounded copy does.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dscoder.checkpoint.sharded import load_sharded, save_sharded
from dscoder.config import ModelConfig
from dscoder.config.train import PretrainConfig
from dscoder.models import Transformer, init_weights
from dscoder.models.sharding import materialise_shards, parts, shard_model
from dscoder.ops import ExchangeOptions, ExpertParallel
from dscoder.runtime.mesh import Mesh
from dscoder.train.memory import RankShare, require_memory
from dscoder.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """This rank's part of a model, with what it needs to run."""

    model: Transformer
    mesh: Mesh
    dtype: torch.dtype  # that it computes and is exported in
    exchange: ExpertParallel | None  # of tokens; None: every rank has all experts

    def save(self, directory: Path, *, tokenizer: Path) -> None:
        """Write the whole model in the published layout; a collective."""
        save_sharded(
            self.model, directory, mesh=self.mesh, dtype=self.dtype, tokenizer=tokenizer, overwrite=True
        )


def _start_exchange(
    config: PretrainConfig, target: ModelConfig, mesh: Mesh, *, max_tokens: int, dtype: torch.dtype
) -> ExpertParallel | None:
    if mesh.expert == 1:
        return None
    assert target.moe is not None  # check_experts_divide
    parallel = config.parallel
    return ExpertParallel(
        mesh.expert_group,
        num_experts=target.moe.num_experts,
        hidden=target.width,
        max_tokens=max_tokens,
        num_topk=target.moe.num_topk,
        dtype=dtype,
        options=ExchangeOptions(
            transport=parallel.transport,
            exact=parallel.exact,
            timeout=parallel.timeout,
            device=mesh.device,
        ),
    )


def spread_model(config: PretrainConfig, target: ModelConfig, ranks: Ranks, *, max_tokens: int) -> Spread:
    """This rank's part of the model `target`, with its first weights or those of `init_from`; a collective.

    Args:
        max_tokens: the most that a rank runs through the model at once.
    """
    mesh = ranks.mesh
    assert mesh is not None
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    has_masters = config.precision != "bf16_stochastic"
    held_dtype = torch.float32 if has_masters else dtype
    exchange = _start_exchange(config, target, mesh, max_tokens=max_tokens, dtype=dtype)
    model = Transformer(target, expert_parallel=exchange, device="meta", dtype=held_dtype)
    shard_model(model, mesh, dtype=dtype, config=config.parallel)
    share = RankShare(
        num_held=sum(part.local.numel() for part in parts(model, mesh).values()),
        num_local_ranks=ranks.num_neighbours(),
    )
    ranks.each(
        lambda: require_memory(
            target, dtype=held_dtype, device=mesh.device, has_masters=has_masters, share=share
        )
    )
    materialise_shards(model, device=mesh.device)
    if config.init_from is None:
        init_weights(model, seed=config.seed, parts=parts(model, mesh), dtype=dtype)
    else:
        load_sharded(model, config.init_from, mesh=mesh, dtype=dtype)
    return Spread(model=model.train(), mesh=mesh, dtype=dtype, exchange=exchange)
