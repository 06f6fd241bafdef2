"""What a forward keeps for its backward pass, counted."""

import torch
from torch import Tensor

from dscoder import ops
from dscoder.config import ModelConfig
from dscoder.config.parallel import Recompute
from dscoder.models import Transformer
from dscoder.models.transformer import Layer
from dscoder.runtime.mesh import open_mesh
from dscoder.train.loss import cross_entropy_sum
from dscoder.train.plan.activations import Tokens


def saved_bytes(model: Transformer, tokens: Tokens, *, recompute: Recompute) -> int:
    """Bytes of all storages that autograd keeps but those of parameters, each counted once."""
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.recompute = recompute
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no two have one address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(model.config.vocab_size, (tokens.sequences, tokens.length), generator=generator)
    ends = torch.arange(tokens.sequences + 1, dtype=torch.int32) * tokens.length
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.features(tokens_BS, cu_seqlens=ends)
        loss = cross_entropy_sum(features.hidden_BSD.flatten(0, 1), model.head.weight, tokens_BS.flatten())
        total = loss + features.balance
    assert total.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def saved_bytes_of_a_rank(model: ModelConfig, tokens: Tokens, recomputes: tuple[Recompute, ...]) -> list[int]:
    """With each form of recomputing, on a rank with half of the experts and slots for the worst case."""
    with open_mesh(expert=2, replicate=1, device="cpu", timeout=60) as mesh:
        assert model.moe is not None
        group = ops.ExpertParallel(
            mesh.expert_group,
            num_experts=model.moe.num_experts,
            hidden=model.width,
            max_tokens=tokens.count,
            num_topk=model.moe.num_topk,
            dtype=torch.bfloat16,
            options=ops.ExchangeOptions(exact=False),
        )
        built = Transformer(model, dtype=torch.bfloat16, expert_parallel=group)
        return [saved_bytes(built, tokens, recompute=recompute) for recompute in recomputes]
