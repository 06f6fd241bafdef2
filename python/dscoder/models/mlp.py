"""The gated MLP: down(silu(gate(x)) * up(x)), SwiGLU (DeepSeek LLM section 2.2), without biases."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder.models.residual import multiply
from dscoder.ops.library import refuse_second_derivative


class _SwiGlu(torch.autograd.Function):
    """Its backward writes both halves of one gradient in place; torch's own joins two copies."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("swiglu")
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2F], gate in the first half -> [..., F]."""
    # The compiler fuses the plain form, and without a gradient it is all there is to do.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out: Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


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

    def forward(self, x_TD: Tensor, onto_TD: Tensor | None = None) -> Tensor:
        """x_TD -> [T, D], added to `onto_TD` in place where there is one."""
        return multiply(self.down, swiglu(self.gate_up(x_TD)), onto_TD)
