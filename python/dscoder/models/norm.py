"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, as LLaMA and both DeepSeek-Coder families use it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder.ops.library import refuse_second_derivative


class _CpuRmsNorm(torch.autograd.Function):
    """GPUs and the compiler have a fused norm; on CPUs torch reads and writes twice as much as this."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=dtype)
        scale_T1: Tensor = length_T1.square_().mul_(1.0 / x_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        out_TD: Tensor = (x_TD * scale_T1).mul_(weight_D).to(x_TD.dtype)
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivative("RMSNorm")
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        grad = grad_TD.to(scale_T1.dtype)
        product_TD = grad * x_TD
        grad_weight_D = product_TD.t() @ scale_T1.squeeze(-1)
        # The part of the gradient along x changes only the length, which the norm takes out again.
        along_T1 = (product_TD @ weight_D.to(grad.dtype)).unsqueeze(-1)
        along_T1 = along_T1.mul_(scale_T1.square()).mul_(-1.0 / x_TD.shape[-1])
        grad_x_TD = (grad * weight_D).addcmul_(x_TD, along_T1).mul_(scale_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D.to(weight_D.dtype), None


class RMSNorm(nn.Module):
    """Scales the last dimension to unit root mean square; sums are float32 or wider for every input type."""

    def __init__(
        self, width: int, *, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD -> the same shape and type."""
        has_fused = x_TD.device.type != "cpu" or torch.compiler.is_compiling()
        if has_fused or not torch.is_grad_enabled():
            return F.rms_norm(x_TD, self.weight.shape, self.weight, self.eps)
        out_TD: Tensor = _CpuRmsNorm.apply(x_TD, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out_TD

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
