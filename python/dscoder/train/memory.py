"""What the state of a run takes in memory, reckoned before any of it is allocated.

Activations come on top: they depend on the batch, and what is refused here has no room without them. Under a
mesh so do the layers that are gathered for a while, and the gradients that add up before they are reduced.
"""

from dataclasses import dataclass

import torch

from dscoder.config import ModelConfig
from dscoder.models import count_parameters
from dscoder.runtime.device import device_memory, host_memory
from dscoder.runtime.log import get_logger

_GIB = 2**30
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes of a run's state: the first three on the device, the last on the host."""

    weights: int
    gradients: int  # float32 in any precision
    optimizer: int  # AdamW's two moments and, beside bf16 weights, the float32 masters if there are any
    checkpoint: int  # the copy that is written to disk while training goes on: masters or weights, moments

    @property
    def on_device(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(
    num_parameters: int, dtype: torch.dtype, *, num_adapters: int | None = None, has_masters: bool = True
) -> StateBytes:
    """What training `num_parameters` weights of type `dtype` takes, or so many of adapters beside them.

    Under a mesh these are the weights that one rank holds, and `dtype` is what it holds them in. Without
    masters, weights narrower than float32 are rounded at random instead.
    """
    num_trained = num_parameters if num_adapters is None else num_adapters
    has_copies = has_masters and dtype != torch.float32
    saved_itemsize = 4 if has_masters else dtype.itemsize
    return StateBytes(
        weights=(num_parameters + (num_adapters or 0)) * dtype.itemsize,
        gradients=num_trained * 4,
        optimizer=num_trained * 4 * (3 if has_copies else 2),
        checkpoint=num_trained * (saved_itemsize + 8),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """What of a run one rank and its machine have."""

    num_held: int | None = None  # parameters on this rank; None: all
    num_local_ranks: int = 1  # that share the memory of the host, and on the CPU that of the device


def require_memory(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_adapters: int | None = None,
    has_masters: bool = True,
    share: RankShare | None = None,
) -> None:
    """Log what training `model` takes; ValueError if `device` or the host cannot hold it even when empty.

    With `num_adapters` so many parameters of adapters are trained, and the model's own stay. Without `share`
    this process has all of the run.
    """
    count = count_parameters(model)
    share = share or RankShare()
    num_held = count.total if share.num_held is None else share.num_held
    need = state_bytes(num_held, dtype, num_adapters=num_adapters, has_masters=has_masters)
    _LOG.info(
        "%s parameters, %s active a token, %s held here; weights %.2f, gradients %.2f and optimizer %.2f GiB "
        "on %s; the checkpoint being written %.2f GiB on the host",
        *(f"{count.total:,}", f"{count.active:,}", f"{num_held:,}"),
        *(need.weights / _GIB, need.gradients / _GIB, need.optimizer / _GIB, device),
        need.checkpoint / _GIB,
    )
    is_shared = device.type == "cpu"
    on_host = (need.checkpoint + (need.on_device if is_shared else 0)) * share.num_local_ranks
    rooms = [("the host", on_host, host_memory())]
    if not is_shared:
        rooms.insert(0, (str(device), need.on_device, device_memory(device)))
    for where, wanted, there in rooms:
        if wanted > there:
            raise ValueError(
                f"train: {where} must have {wanted / _GIB:.1f} GiB of memory for the {count.total:,} "
                f"parameters of the model in training, before activations, got {there / _GIB:.1f} GiB"
            )
