"""moe_permute and moe_unpermute in Triton, with gradients; no choice may be dropped.

Copies go token by token: a row is read once and written K times, or K rows are read and summed in float32.
Block size and warps are tuned on the first call.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from benchmarks.peers.triton_gate import clock, configs
from benchmarks.peers.triton_maps import maps

_BLOCKS_AND_WARPS = ((1024, 4), (2048, 4), (2048, 8), (8192, 8))
COPY_CONFIGS = configs([Config({"BLOCK": block}, num_warps=warps) for block, warps in _BLOCKS_AND_WARPS])
ROW_CONFIGS = configs([Config({}, num_warps=warps) for warps in (4, 8, 16)])


@triton.autotune(COPY_CONFIGS, key=["num_tokens", "width", "K"], do_bench=clock)
@triton.jit
def spread_kernel(x, row, out, num_tokens, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[row[t, k]] = x[t]."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + t * width + d, mask=d < width)
    for k in tl.static_range(K):
        m = tl.load(row + t * K + k).to(tl.int64)
        tl.store(out + m * width + d, value, mask=d < width, eviction_policy="evict_first")


@triton.autotune(COPY_CONFIGS, key=["num_tokens", "width", "K"], do_bench=clock)
@triton.jit
def collect_kernel(y, weight, row, out, num_tokens, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over k of weight[t, k] * y[row[t, k]]; weight None: of the rows alone."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        m = tl.load(row + t * K + k).to(tl.int64)
        value = tl.load(y + m * width + d, mask=d < width, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + t * K + k)
        total += value
    tl.store(out + t * width + d, total, mask=d < width)


@triton.autotune(ROW_CONFIGS, key=["num_tokens", "width", "K"], do_bench=clock)
@triton.jit
def collect_backward_kernel(tensors, num_tokens, width, K: tl.constexpr, PADDED: tl.constexpr):
    """A program keeps the gradient of a whole token: read once for K rows and K dot products."""
    grad, y, weight, row, grad_y, grad_weight = tensors
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    g = tl.load(grad + t * width + d, mask=d < width, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        m = tl.load(row + t * K + k).to(tl.int64)
        value = tl.load(y + m * width + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(grad_weight + t * K + k, tl.sum(g * value, axis=0))
        tl.store(grad_y + m * width + d, g * tl.load(weight + t * K + k), mask=d < width)


def _grid(num_tokens: int, width: int) -> Any:
    return lambda meta: (num_tokens, triton.cdiv(width, meta["BLOCK"]))


def _collect(y_MD: Tensor, weight_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    (num_tokens, num_topk), width = row_TK.shape, y_MD.shape[1]
    out_TD = y_MD.new_empty(num_tokens, width)
    collect_kernel[_grid(num_tokens, width)](y_MD, weight_TK, row_TK, out_TD, num_tokens, width, K=num_topk)
    return out_TD


class Spread(torch.autograd.Function):
    """(x_TD, row_TK) -> x_MD."""

    @staticmethod
    def forward(ctx, x_TD, row_TK):
        """One launch."""
        (num_tokens, num_topk), width = row_TK.shape, x_TD.shape[1]
        x_MD = x_TD.new_empty(row_TK.numel(), width)
        spread_kernel[_grid(num_tokens, width)](x_TD, row_TK, x_MD, num_tokens, width, K=num_topk)
        ctx.save_for_backward(row_TK)
        return x_MD

    @staticmethod
    def backward(ctx, grad_MD):
        """One launch."""
        return _collect(grad_MD.contiguous(), None, *ctx.saved_tensors), None


class Collect(torch.autograd.Function):
    """(y_MD, weight_TK, row_TK) -> out_TD."""

    @staticmethod
    def forward(ctx, y_MD, weight_TK, row_TK):
        """One launch."""
        ctx.save_for_backward(y_MD, weight_TK, row_TK)
        return _collect(y_MD, weight_TK, row_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        """One launch for both gradients."""
        y_MD, weight_TK, row_TK = ctx.saved_tensors
        (num_tokens, num_topk), width = row_TK.shape, y_MD.shape[1]
        grad_y, grad_weight = torch.empty_like(y_MD), torch.empty_like(weight_TK)
        tensors = (grad_TD.contiguous(), y_MD, weight_TK, row_TK, grad_y, grad_weight)
        padded = triton.next_power_of_2(width)
        collect_backward_kernel[(num_tokens,)](tensors, num_tokens, width, K=num_topk, PADDED=padded)
        return grad_y, grad_weight, None


def permute(x_TD: Tensor, idx_TK: Tensor, num_experts: int) -> Tensor:
    """moe_permute's rows, the maps included."""
    return Spread.apply(x_TD, maps(idx_TK, num_experts)[1])


def unpermute(y_MD: Tensor, weight_TK: Tensor, row_TK: Tensor) -> Tensor:
    """moe_unpermute."""
    return Collect.apply(y_MD, weight_TK, row_TK)
