"""The whole of a tensor that ranks hold parts of, on every version of torch that is supported."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of which `tensor`, a DTensor, is this rank's part; a collective."""
    assert isinstance(tensor, DTensor)
    # One dimension at a time: torch 2.11 cannot gather over expert and expert_shard, in this order, at once.
    for dim in reversed(range(len(tensor.placements))):
        tensor = tensor.redistribute(
            placements=(*tensor.placements[:dim], *[Replicate()] * (len(tensor.placements) - dim))
        )
    return tensor.to_local()
