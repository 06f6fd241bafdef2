"""Memory for the weights of a model, and their first values: normal for every matrix, ones for the norms."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dscoder.config import ModelConfig


class Initializable(Protocol):
    """What `init_weights` needs of a model."""

    config: ModelConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, tied ones under their first name."""


class Held(Protocol):
    """What `init_weights` needs to know of a parameter that this process may hold in part."""

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    @property
    def local(self) -> Tensor:
        """The memory of what is held."""

    def take(self, full: Tensor) -> Tensor:
        """What is held of `full`, which has `whole_shape`."""


def materialise(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device memory for its weights, tied ones once; what they hold is not set.

    nn.Module.to_empty unties, and pulls in a second of imports for decompositions on the meta device.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, made[parameter])


@torch.no_grad()
def init_weights(
    model: Initializable,
    *,
    seed: int,
    parts: Mapping[str, Held] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill all parameters in place: matrices normal(0, config.init_std) (0.006 in both papers), norms 1.

    The same seed, kind of device, config and type to draw in give the same weights, however many ranks hold
    them: each draws every parameter whole, experts of others too, one at a time, and keeps its part. (Drawing
    a stack expert by expert would need less memory, but on a GPU gives other values than the whole.)

    Args:
        parts: what this rank holds of each parameter, by name. None: all of it.
        dtype: to draw in, before values go into the parameters. None: the parameters' own.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        part = None if parts is None else parts[name]
        memory = parameter if part is None else part.local
        if parameter.dim() == 1:
            memory.fill_(1.0)
            continue
        if memory.device not in generators:
            generators[memory.device] = torch.Generator(memory.device).manual_seed(seed)
        generator = generators[memory.device]
        if part is None and dtype in (None, parameter.dtype):
            parameter.normal_(0.0, model.config.init_std, generator=generator)
            continue
        shape = tuple(parameter.shape) if part is None else part.whole_shape
        full = torch.empty(shape, dtype=dtype or memory.dtype, device=memory.device)
        full.normal_(0.0, model.config.init_std, generator=generator)
        memory.copy_(full if part is None else part.take(full))
