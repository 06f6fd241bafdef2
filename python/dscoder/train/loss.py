"""Next-token cross-entropy in float32, a chunk of tokens at a time.

The logits of a batch are its largest tensor by far (T * V float32). A chunk's logits become loss, gradient
of the hidden states and gradient of the head in one go and are then dropped, so that no more than one chunk
of them exists and nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dscoder.data.loader import IGNORED

CHUNK_TOKENS = 2048  # whose logits exist at once


def _logits_gradient(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses of labelled rows, and its gradient, which takes the memory of `logits_TV`."""
    is_labelled_T = (labels_T != IGNORED).to(logits_TV.dtype)
    targets_T = labels_T.clamp(min=0)
    rows_T = torch.arange(len(labels_T), device=labels_T.device)
    largest_T = logits_TV.amax(dim=-1)
    target_logits_T = logits_TV[rows_T, targets_T]
    # One exponential serves both: softmax = exp / sum, loss = log(sum) - logit.
    exp_TV = logits_TV.sub_(largest_T[:, None]).exp_()
    sum_T = exp_TV.sum(dim=-1)
    nll_T = sum_T.log() + largest_T - target_logits_T
    gradient_TV = exp_TV.mul_((is_labelled_T / sum_T)[:, None])
    gradient_TV[rows_T, targets_T] -= is_labelled_T
    return (nll_T * is_labelled_T).sum(), gradient_TV


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        hidden_gradient_TD = torch.empty_like(hidden_TD)
        # None beside adapters, where the head stays.
        weight_gradient_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(hidden_TD), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk_TD = hidden_TD[rows]
            loss, gradient_TV = _logits_gradient((chunk_TD @ weight_VD.T).float(), labels_T[rows])
            total += loss
            gradient_TV = gradient_TV.to(hidden_TD.dtype)
            torch.mm(gradient_TV, weight_VD, out=hidden_gradient_TD[rows])
            if weight_gradient_VD is not None:
                weight_gradient_VD += gradient_TV.T @ chunk_TD
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD.to(weight_VD.dtype)
        ctx.save_for_backward(hidden_gradient_TD, weight_gradient_VD)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden_gradient_TD, weight_gradient_VD = ctx.saved_tensors
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD * scale
        return hidden_gradient_TD * scale, weight_gradient_VD, None


def cross_entropy_sum(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The sum of -log p(label) over the positions whose label is not IGNORED, as a float32 scalar.

    Differentiable once in `hidden_TD` and `weight_VD`. The softmax is float32 whatever their dtype is.
    """
    if hidden_TD.ndim != 2 or labels_T.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"cross_entropy_sum: labels_T must have one label a row of hidden_TD {list(hidden_TD.shape)}, "
            f"got {list(labels_T.shape)}"
        )
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def token_losses(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """-log p(label) of each position in float32, 0 where the label is IGNORED: [T]."""
    parts = []
    for start in range(0, len(hidden_TD), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        logits_TV = (hidden_TD[rows] @ weight_VD.T).float()
        parts.append(F.cross_entropy(logits_TV, labels_T[rows], ignore_index=IGNORED, reduction="none"))
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0, dtype=torch.float32)
