"""What one decoding step has to read, and which experts its tokens chose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder.config import ModelConfig
from dscoder.models import count_parameters
from dscoder.models.cache import cache_token_bytes


def decode_bytes(
    config: ModelConfig, *, num_rows: int, context: int, num_hit: Sequence[int], dtype: torch.dtype
) -> int:
    """Bytes that a step of `num_rows` rows of `context` tokens, the one it adds among them, must move.

    Every weight that some token meets once (`num_hit`: of each expert layer, how many routed experts were
    chosen), a row of the embedding for each token, every cached row once: read, or written if it is new. What
    goes from one op to the next could stay in a cache, and is not counted.
    """
    num_moe_layers = sum(config.is_moe_layer(layer_idx) for layer_idx in range(config.num_layers))
    if len(num_hit) != num_moe_layers:
        raise ValueError(
            f"decode_bytes: num_hit must have one number for each of {num_moe_layers} expert layers, "
            f"got {len(num_hit)}"
        )
    weights = count_parameters(config).active
    if config.moe is not None:
        expert = 3 * config.width * config.moe.expert_width
        weights += (sum(num_hit) - num_moe_layers * config.moe.num_topk) * expert
    weights += num_rows * config.width
    return weights * dtype.itemsize + num_rows * context * cache_token_bytes(config, dtype)


class _Choices(TorchDispatchMode):
    """Notes how many experts each gate chose."""

    def __init__(self) -> None:
        super().__init__()
        self.num_hit: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.dscoder.moe_gate.default:
            (idx_TK,) = (one for one in result if one.dtype == torch.int32)
            self.num_hit.append(idx_TK.unique().numel())
        return result


def experts_hit(call: Callable[[], Any]) -> list[int]:
    """How many routed experts each expert layer runs in `call()`."""
    with _Choices() as choices:
        call()
    return choices.num_hit
