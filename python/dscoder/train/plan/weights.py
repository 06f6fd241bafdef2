"""How many parameters of each layer a rank holds, gathers and sums gradients of.

The shapes are those of the model itself, built on the meta device, so that they cannot differ from it.
A rank of n holds ceil(rows / n) rows of a parameter; the first rank, which is told of here, always holds the
most. Stacks of experts are divided by experts, or along their rows where only those divide evenly.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dscoder.config import ModelConfig
from dscoder.models import Transformer
from dscoder.models.sharding import expert_shard_dim
from dscoder.train.plan.layout import Layout

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERTS = ".moe.experts."
_ROOT = -1

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is gathered and freed together: a layer, or (the root) all that is in none."""

    dense: tuple[Shape, ...]
    experts: tuple[Shape, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Layers that are alike."""

    first_idx: int  # of these layers
    count: int
    unit: Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The parameters of a model by unit."""

    root: Unit
    kinds: tuple[LayerKind, ...]

    def sum_over(self, numel: Callable[[Unit], int]) -> int:
        """`numel` of the root and of every layer, added up."""
        return numel(self.root) + sum(kind.count * numel(kind.unit) for kind in self.kinds)


def weights_of(model: ModelConfig) -> Weights:
    """The shapes of all parameters; a table that is the head too stands once."""
    shapes: dict[int, tuple[list[Shape], list[Shape]]] = {}
    for name, parameter in Transformer(model, device="meta").named_parameters():
        found = _LAYER.match(name)
        dense, experts = shapes.setdefault(int(found[1]) if found else _ROOT, ([], []))
        (experts if _EXPERTS in name else dense).append(tuple(parameter.shape))
    units = {
        idx: Unit(dense=tuple(dense), experts=tuple(experts)) for idx, (dense, experts) in shapes.items()
    }
    root = units.pop(_ROOT)
    alike: dict[Unit, list[int]] = {}
    for idx, unit in sorted(units.items()):
        alike.setdefault(unit, []).append(idx)
    kinds = (LayerKind(first_idx=idxs[0], count=len(idxs), unit=unit) for unit, idxs in alike.items())
    return Weights(root=root, kinds=tuple(kinds))


@cache
def dense_numel(unit: Unit) -> int:
    """Elements of a unit's dense and shared parameters, whole."""
    return sum(math.prod(shape) for shape in unit.dense)


def local_experts_numel(unit: Unit, layout: Layout) -> int:
    """Elements of the routed experts of a unit that one rank computes with."""
    return _experts_numel(unit, layout.expert, 1)


def gathered_numel(unit: Unit, layout: Layout) -> int:
    """Elements that a rank has in memory while it computes the unit."""
    return dense_numel(unit) + local_experts_numel(unit, layout)


def held_numel(unit: Unit, layout: Layout) -> int:
    """Elements of the unit that the first rank holds for good."""
    return _held_dense(unit, layout.shard) + _experts_numel(unit, layout.expert, layout.expert_shard)


@cache
def _held_dense(unit: Unit, num_shards: int) -> int:
    return sum(_held(shape, num_shards) for shape in unit.dense)


@cache
def _experts_numel(unit: Unit, num_ranks: int, num_shards: int) -> int:
    """Of one of `num_ranks` that share the experts out, and of one of `num_shards` parts of that."""
    local = ((rows // num_ranks, *rest) for rows, *rest in unit.experts)
    return sum(_held(shape, num_shards, expert_shard_dim(shape, num_shards)) for shape in local)


def _held(shape: Shape, num_shards: int, dim: int = 0) -> int:
    return -(-shape[dim] // num_shards) * math.prod(shape) // shape[dim]
