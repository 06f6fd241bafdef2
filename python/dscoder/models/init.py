"""Memory for the weights of a model, and their first values: normal for every matrix, ones for the norms."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from dscoder.config import ModelConfig


class Initializable(Protocol):
    """What `init_weights` needs of a model."""

    config: ModelConfig

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, tied ones under their first name."""


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
def init_weights(model: Initializable, *, seed: int) -> None:
    """Fill all parameters in place: matrices normal(0, config.init_std) (0.006 in both papers), norms 1.

    The same seed, device and config give the same weights.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for _, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(0.0, model.config.init_std, generator=generators[parameter.device])
