"""Activation checkpointing changes what is kept and what is computed twice, and no bit of the gradients."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder.config.parallel import Recompute
from dscoder.models import Transformer
from tests.models.sharded import loss_of, tiny, tokens_of, whole_model

EXPERTS = torch.ops.dscoder.moe_experts.default
ATTENTION = torch.ops.dscoder.mla_prefill.default


class CountCalls(TorchDispatchMode):
    """Counts the calls of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def model_with(recompute: Recompute, name: str = "tiny_moe") -> Transformer:
    model = whole_model(tiny(name))
    for layer in model.layers:
        layer.recompute = recompute
    return model


def gradients(model: Transformer) -> dict[str, Tensor | None]:
    loss_of(model, tokens_of(0, model.config), num_batches=1).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def kept_bytes(model: Transformer) -> int:
    """What the graph of one forward holds, each memory once, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, tokens_of(0, model.config), num_batches=1)
    total = sum(kept.values())
    loss.backward()  # the graph lived until here, so no memory was counted for two tensors
    return total


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_bitwise_those_without(name: str, recompute: Recompute) -> None:
    wanted = gradients(model_with("none", name))
    got = gradients(model_with(recompute, name))
    assert got.keys() == wanted.keys()
    for key, gradient in got.items():
        assert gradient is not None
        assert torch.equal(gradient, wanted[key])  # type: ignore[arg-type]


# A layer with experts after a dense one.
@pytest.mark.parametrize(
    ("recompute", "num_experts", "num_attentions"), [("none", 1, 2), ("selective", 1, 4), ("full", 2, 4)]
)
def test_selective_computes_all_but_the_experts_twice(
    recompute: Recompute, num_experts: int, num_attentions: int
) -> None:
    with CountCalls() as counted:
        gradients(model_with(recompute))
    assert counted.calls[EXPERTS] == num_experts
    assert counted.calls[ATTENTION] == num_attentions


def test_full_keeps_less_than_selective_and_selective_less_than_none() -> None:
    none, selective, full = (kept_bytes(model_with(mode)) for mode in ("none", "selective", "full"))
    assert full < selective < none


def test_without_gradients_nothing_is_wrapped() -> None:
    model = model_with("full")
    with CountCalls() as counted, torch.no_grad():
        model.features(tokens_of(0, model.config))
    assert counted.calls[EXPERTS] == 1


def test_loads_count_every_choice_once() -> None:
    config = tiny("tiny_moe")
    assert config.moe is not None
    for mode in ("none", "selective", "full"):
        loads_LE = model_with(mode).features(tokens_of(0, config)).loads_LE
        assert loads_LE is not None
        assert loads_LE.shape == (1, config.moe.num_experts)
        assert int(loads_LE.sum()) == tokens_of(0, config).numel() * config.moe.num_topk
    assert whole_model(config).eval().features(tokens_of(0, config)).loads_LE is None
