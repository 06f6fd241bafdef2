"""torch.compile of the dense parts: attention, norms, dense and shared MLPs.

The routed experts stay as they are: their products are ops of their own, and the number of their rows is
known on the device alone. Layers share their graphs, so a model of any depth compiles a few.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dscoder.models.transformer import Layer, Transformer


def _run(eager: Callable[..., Any], compiled: Callable[..., Any], x_TD: Tensor, *args: Any) -> Any:
    # A rank without a micro-batch runs one of no tokens, which inductor fails on.
    return (compiled if len(x_TD) else eager)(x_TD, *args)


def compile_dense(model: Transformer, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the dense parts of every layer in place, when they first run; names of weights stay.

    Sharding and recomputation go on around the compiled parts, whichever came first. Numbers change as fused
    kernels round otherwise.
    """
    for layer in model.layers:
        assert isinstance(layer, Layer)
        dense: list[nn.Module] = [layer.attention_norm, layer.attention, layer.mlp_norm]
        if not layer.is_moe:
            dense.append(layer.mlp)
        elif layer.moe.shared is not None:
            dense.append(layer.moe.shared)
        for module in dense:
            eager = module.forward
            compiled: Callable[..., Any] = torch.compile(eager, backend=backend)
            module.forward = partial(_run, eager, compiled)
