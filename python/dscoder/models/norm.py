"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, as LLaMA and both DeepSeek-Coder families use it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales the last dimension to unit root mean square; sums are float32 or wider for every input type."""

    def __init__(
        self, width: int, *, eps: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
