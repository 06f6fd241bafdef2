"""The gated MLP: down(silu(gate(x)) * up(x)), SwiGLU (DeepSeek LLM section 2.2), without biases."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F], gate in the first half -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Mlp(nn.Module):
    """Gate and up are one matrix, gate rows first: one product reads x once."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(mlp_width, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
