"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers: x W' + scale * (x A') B', A and B trained.

A layer that stands for two published ones (gate above up) has an adapter for each, on its half of the rows,
so that adapters are exactly those that `peft` has on the published model.

Decoding with a cache reads the weights themselves, past any adapter: merge the adapters first. An adapted
layer refuses to show its weight, so that none is left out unseen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder.config.lora import LoraConfig
from dscoder.models.transformer import Transformer
from dscoder.runtime.seed import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPart:
    """Where one adapter sits."""

    name: str  # of the published layer: "model.layers.0.mlp.up_proj"
    module: str  # of the linear layer in the model: "layers.0.mlp.gate_up"
    half_idx: int | None = None  # of its rows: 0 the first half, 1 the second; None: all


class LoraLinear(nn.Module):
    """A linear layer that stays, and the adapters on its rows."""

    def __init__(self, base: nn.Linear, parts: Sequence[LoraPart], config: LoraConfig) -> None:
        """Wrap `base`; A is zero too until it is initialised or loaded."""
        super().__init__()
        self.base = base
        self.parts = tuple(sorted(parts, key=lambda part: part.half_idx or 0))
        self.config = config
        num_rows, num_in = base.weight.shape
        num_rows //= 1 if self.parts[0].half_idx is None else 2

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=base.weight.device, dtype=base.weight.dtype))

        self.downs = nn.ParameterList([zeros(config.rank, num_in) for _ in self.parts])  # A: [rank, in]
        self.ups = nn.ParameterList([zeros(num_rows, config.rank) for _ in self.parts])  # B: [out, rank]

    @property
    def weight(self) -> Tensor:
        """Refused: it would be the weight without the adapters."""
        raise RuntimeError(
            f"lora: the adapters of {self.parts[0].module} must be merged before its weight is read, as "
            "decoding with a cache does; call merge_lora on the model, or on a copy of it"
        )

    def forward(self, x_TF: Tensor) -> Tensor:
        """The layer's product plus those of its adapters."""
        out_TD: Tensor = self.base(x_TF)
        seen_TF = F.dropout(x_TF, self.config.dropout, training=self.training)
        added = [
            F.linear(F.linear(seen_TF, down), up) * self.config.scale
            for down, up in zip(self.downs, self.ups, strict=True)
        ]
        if self.parts[0].half_idx is None:
            return out_TD + added[0]
        halves = list(out_TD.chunk(2, dim=-1))
        for part, part_TD in zip(self.parts, added, strict=True):
            assert part.half_idx is not None
            halves[part.half_idx] = halves[part.half_idx] + part_TD
        return torch.cat(halves, dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear layer with the adapters added into its weight, in place; sums are in float32."""
        for part, down, up in zip(self.parts, self.downs, self.ups, strict=True):
            rows = self.base.weight
            if part.half_idx is not None:
                rows = rows.chunk(2, dim=0)[part.half_idx]
            rows.copy_(rows.float() + self.config.scale * (up.float() @ down.float()))
        return self.base


def lora_layers(model: Transformer) -> Iterator[LoraLinear]:
    """Every adapted layer, in the order of the model."""
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def add_lora(model: Transformer, parts: Sequence[LoraPart], config: LoraConfig, *, seed: int) -> None:
    """Put adapters into `model`, in place, and let nothing else be trained; its answers stay the same.

    A is uniform in +-1 / sqrt(in), as in peft, by the seed and the layer's published name; B is zero.
    """
    if any(lora_layers(model)):
        raise ValueError(
            "add_lora: model must have no adapters, got one that has; merge or remove them first"
        )
    if not parts:
        raise ValueError("add_lora: parts must name a layer, got none")
    by_module: dict[str, list[LoraPart]] = {}
    for part in parts:
        by_module.setdefault(part.module, []).append(part)
    model.requires_grad_(False)
    for path, of_module in by_module.items():
        base = model.get_submodule(path)
        if not isinstance(base, nn.Linear):
            raise ValueError(f"add_lora: {path} must be a linear layer, got {type(base).__name__}")
        layer = LoraLinear(base, of_module, config)
        _init_downs(layer, seed=seed)
        layer.train(base.training)
        _replace(model, path, layer)


@torch.no_grad()
def _init_downs(layer: LoraLinear, *, seed: int) -> None:
    for part, down in zip(layer.parts, layer.downs, strict=True):
        generator = torch.Generator().manual_seed(derive_seed("lora", seed, part.name))
        bound = 1.0 / math.sqrt(down.shape[1])
        # On the CPU, so that every device begins with the same numbers.
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def merge_lora(model: Transformer) -> None:
    """Add every adapter into its weight, in place, and leave a plain model, all of it trainable."""
    for layer in list(lora_layers(model)):
        _replace(model, layer.parts[0].module, layer.merged())
    model.requires_grad_(True)


def remove_lora(model: Transformer) -> None:
    """Take every adapter away, in place: the plain model as it was before them, all of it trainable."""
    for layer in list(lora_layers(model)):
        _replace(model, layer.parts[0].module, layer.base)
    model.requires_grad_(True)
