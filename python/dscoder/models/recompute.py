"""Activation checkpointing: less is kept for the gradient, and computed again when the gradient comes.

`full` keeps each layer's input. `selective` also keeps what the routed experts computed, the dearest part:
their gradients then need neither a second exchange of tokens nor a second product.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recomputed(function: Callable[[Tensor], Result], x: Tensor) -> Result:
    """function(x), of which nothing is kept for the gradient but x and what comes out.

    `function` must use no random numbers.
    """
    result: Result = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result
