"""A model spread over the ranks of a mesh by FSDP2, and what each rank holds of every parameter.

Every layer is a unit that is gathered when it runs; its routed experts are one of their own, over the ranks
that hold the same experts, gathered along with it; embedding, norm and head are the last. Gradients are sums
over ranks, in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from dscoder.config.parallel import ParallelConfig
from dscoder.models.moe import Experts, Moe
from dscoder.models.region import Region, region_at
from dscoder.models.transformer import Layer, Transformer
from dscoder.runtime.mesh import Mesh


def _fsdp_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """What fully_shard takes: dimension `name` of `mesh`, and the replicas where there are several."""
    return mesh[name] if mesh.size(0) == 1 else mesh["replicate", name]


def expert_shard_dim(shape: Sequence[int], num_shards: int) -> int:
    """Where a stack is cut: by experts if they divide evenly, else by rows if those do, to keep none idle."""
    return 1 if shape[0] % num_shards and shape[1] % num_shards == 0 else 0


def _check_experts(model: Transformer, num_ranks: int) -> None:
    for module in model.modules():
        if isinstance(module, Moe) and len(module.experts.down) * num_ranks != module.config.num_experts:
            raise ValueError(
                f"shard_model: the model must hold {module.config.num_experts} / {num_ranks} experts of each "
                f"layer, got {len(module.experts.down)}; build it with expert_parallel"
            )


def shard_model(model: Transformer, mesh: Mesh, *, dtype: torch.dtype, config: ParallelConfig) -> None:
    """Shard a model in place, on the meta device too; from then on each rank holds its part of every weight.

    The model is whole but for its experts, of which it has this rank's share (`expert_parallel`). It computes
    in `dtype`: weights in another are rounded to it as they are gathered, and stay what the optimizer moves.
    Gradients are summed over all ranks in float32; with model.set_requires_gradient_sync(False) they add up
    on each rank until a backward pass with True. Embedding, norm and head stay gathered after a forward.
    """
    _check_experts(model, mesh.expert)
    policy = MixedPrecisionPolicy(
        param_dtype=None if model.embed.weight.dtype == dtype else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # angles stay float32, and everything else comes from the embedding
    )
    reshards = config.reshard_after_forward
    dense = partial(fully_shard, mesh=_fsdp_mesh(mesh.shard_devices, "shard"), mp_policy=policy)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if layer.is_moe:
            fully_shard(
                layer.moe.experts,
                mesh=_fsdp_mesh(mesh.expert_devices, "expert_shard"),
                mp_policy=policy,
                reshard_after_forward=reshards,
                shard_placement_fn=lambda weight: Shard(expert_shard_dim(weight.shape, mesh.expert_shard)),
            )
        dense(layer, reshard_after_forward=reshards)
        if layer.is_moe:
            experts = layer.moe.experts
            assert isinstance(layer, FSDPModule)
            assert isinstance(experts, FSDPModule)
            # With the layer's own weights: where they are first used the host may have waited for tokens.
            layer.set_modules_to_forward_prefetch([experts])
    dense(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "run_layers")  # all that `features` computes with weights
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def materialise_shards(model: Transformer, *, device: torch.device) -> None:
    """Give a sharded model on the meta device memory for its parts; what they hold is not set."""
    model.to_empty(device=device)
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight  # to_empty unties


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What this rank holds of one parameter: all of it without a mesh."""

    name: str
    parameter: nn.Parameter
    whole_shape: torch.Size
    devices: DeviceMesh | None = None  # the first dimension is that of the replicas
    placements: tuple[Placement, ...] = ()  # by dimension of `devices`; cut in their order

    @property
    def local(self) -> Tensor:
        """This rank's memory of the parameter, without autograd; empty where others hold everything."""
        return _local(self.parameter.detach())

    def gradient(self) -> Tensor | None:
        """The float32 gradient, summed over all ranks and laid out as `local`; None before the first."""
        gradient = self.parameter.grad
        return None if gradient is None else _local(gradient).float()

    def whole(self, tensor: Tensor) -> Tensor:
        """`tensor`, laid out as `local`, as a part of the whole that torch.distributed knows how to save.

        It shares the memory. Without a mesh `tensor` itself.
        """
        if self.devices is None:
            return tensor
        strides = torch.empty(self.whole_shape, device="meta").stride()
        return DTensor.from_local(
            tensor, self.devices, self.placements, run_check=False, shape=self.whole_shape, stride=strides
        )

    def take(self, full: Tensor) -> Tensor:
        """The part of `full`, a tensor of `whole_shape`, that is this rank's: a view."""
        if full.shape != self.whole_shape:
            wanted, got = tuple(self.whole_shape), tuple(full.shape)
            raise ValueError(f"{self.name}: the whole must have shape {wanted}, got {got}")
        if self.devices is None:
            return full
        coordinate = self.devices.get_coordinate()
        assert coordinate is not None  # every rank is in the mesh
        for dim, placement in enumerate(self.placements):
            if isinstance(placement, Shard):
                full = _chunk(full, placement.dim, coordinate[dim], self.devices.size(dim))
        return full

    @property
    def region(self) -> Region:
        """The box of the whole that this rank holds; `local` has its shape."""
        # A view of nothing: its offset and shape say where it is.
        held = self.take(torch.empty(self.whole_shape, device="meta"))
        return region_at(self.whole_shape, offset=int(held.storage_offset()), shape=tuple(held.shape))


def move_gradient(parameter: Tensor, total: Tensor | None) -> Tensor:
    """Take the gradient away from `parameter`, which has one, and add this rank's part of it to `total`.

    Returns:
        `total`, float32, changed in place; the gradient itself, in float32, where there is none so far.
    """
    assert parameter.grad is not None
    gradient = _local(parameter.grad)
    parameter.grad = None
    return gradient.float() if total is None else total.add_(gradient)


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunk(tensor: Tensor, dim: int, chunk_idx: int, num_chunks: int) -> Tensor:
    """Chunk `chunk_idx` as FSDP and DTensor cut: of equal size, the last ones shorter or empty."""
    length = tensor.shape[dim]
    size = -(-length // num_chunks)
    start = min(chunk_idx * size, length)
    return tensor.narrow(dim, start, min(size, length - start))


def parts(model: nn.Module, mesh: Mesh | None) -> dict[str, Part]:
    """The parts of all parameters by name, tied ones once; without a mesh the whole parameters.

    Of a sharded model on the meta device the parts change with `materialise_shards`.
    """
    if mesh is None:
        return {
            name: Part(name=name, parameter=parameter, whole_shape=parameter.shape)
            for name, parameter in model.named_parameters()
        }
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # where weights are gathered, the module shows those
    of_experts = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        shape, shard = parameter.shape, parameter.placements[-1]
        if id(parameter) in of_experts:
            found[name] = Part(
                name=name,
                parameter=parameter,
                whole_shape=torch.Size((shape[0] * mesh.expert, *shape[1:])),
                devices=mesh.expert_devices,
                placements=(Replicate(), Shard(0), shard),
            )
        else:
            found[name] = Part(
                name=name,
                parameter=parameter,
                whole_shape=shape,
                devices=mesh.shard_devices,
                placements=(Replicate(), shard),
            )
    return found


def is_counted(part: Part) -> bool:
    """Whether this rank's copy enters a sum over all ranks: replicas other than the first do not."""
    return part.devices is None or part.devices.get_local_rank(0) == 0
