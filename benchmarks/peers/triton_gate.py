"""moe_gate in Triton: softmax, best groups and K experts in one launch, the gradient in another.

A program takes a few tokens. Experts lie in a [groups, group width] grid padded to powers of two; the K best
are found by K reductions. Block size and warps are tuned for each size on the first call.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config


def configs(sizes: list[Config]) -> list[Config]:
    """What to tune over; the interpreter has no clock and takes the first."""
    return sizes[:1] if triton.knobs.runtime.interpret else sizes


def clock(kernel: Any, quantiles: Any) -> Any:
    """Shorter than Triton's own: a kernel here takes microseconds."""
    return triton.testing.do_bench(kernel, warmup=5, rep=20, quantiles=quantiles)


TOKENS_AND_WARPS = ((4, 1), (8, 2), (16, 2), (32, 4))  # each costs a second of compiling a shape
CONFIGS = configs([Config({"BLOCK": tokens}, num_warps=warps) for tokens, warps in TOKENS_AND_WARPS])


@triton.autotune(CONFIGS, key=["num_tokens", "SHAPE"], do_bench=clock)
@triton.jit
def forward_kernel(tensors, num_tokens, scale, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    logits, idx, weight = tensors  # [T, E], [T, K], [T, K]
    EXPERTS: tl.constexpr = SHAPE[0]
    GROUPS: tl.constexpr = SHAPE[1]
    KEPT: tl.constexpr = SHAPE[2]
    K: tl.constexpr = SHAPE[3]
    WIDTH: tl.constexpr = EXPERTS // GROUPS
    PADDED_GROUPS: tl.constexpr = triton.next_power_of_2(GROUPS)
    PADDED_WIDTH: tl.constexpr = triton.next_power_of_2(WIDTH)
    COLUMNS: tl.constexpr = PADDED_GROUPS * PADDED_WIDTH
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group, member = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_WIDTH)
    is_real = ((group < GROUPS)[:, None] & (member < WIDTH)[None, :])[None]
    place = t.to(tl.int64)[:, None, None] * EXPERTS + (group[:, None] * WIDTH + member[None, :])[None]
    x = tl.load(logits + place, mask=(t < num_tokens)[:, None, None] & is_real, other=-float("inf"))
    x = x.to(tl.float32)
    # Softmax over all experts, before any group is dropped.
    best = tl.max(x, axis=2)
    top = tl.max(best, axis=1)
    total = tl.sum(tl.sum(tl.exp(x - top[:, None, None]), axis=2), axis=1)
    if KEPT < GROUPS:
        is_kept = tl.zeros((BLOCK, PADDED_GROUPS), tl.int1)
        for _ in tl.static_range(KEPT):
            _, winner = tl.max(best, axis=1, return_indices=True)
            is_winner = group[None, :] == winner[:, None]
            is_kept |= is_winner
            best = tl.where(is_winner, -float("inf"), best)
        x = tl.where(is_kept[:, :, None], x, -float("inf"))
    x = tl.reshape(x, (BLOCK, COLUMNS))
    column = tl.arange(0, COLUMNS)
    for k in tl.static_range(K):
        value, where = tl.max(x, axis=1, return_indices=True)  # ties go to the smaller column
        x = tl.where(column[None, :] == where[:, None], -float("inf"), x)
        expert = where // PADDED_WIDTH * WIDTH + where % PADDED_WIDTH
        tl.store(idx + t * K + k, expert, mask=t < num_tokens)
        tl.store(weight + t * K + k, tl.exp(value - top) / total * scale, mask=t < num_tokens)


@triton.autotune(CONFIGS, key=["num_tokens", "SHAPE"], do_bench=clock)
@triton.jit
def backward_kernel(tensors, num_tokens, scale, SHAPE: tl.constexpr, BLOCK: tl.constexpr):
    logits, idx, grad_weight, grad_logits = tensors  # [T, E], [T, K], [T, K], [T, E]
    EXPERTS: tl.constexpr = SHAPE[0]
    K: tl.constexpr = SHAPE[1]
    PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    place = t.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
    mask = (t < num_tokens)[:, None] & (expert < EXPERTS)[None, :]
    x = tl.load(logits + place, mask=mask, other=-float("inf")).to(tl.float32)
    exponent = tl.exp(x - tl.max(x, axis=1)[:, None])
    probs = exponent / tl.sum(exponent, axis=1)[:, None]
    grad_probs = tl.zeros((BLOCK, PADDED), tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(idx + t * K + k, mask=t < num_tokens, other=-1)
        grad = tl.load(grad_weight + t * K + k, mask=t < num_tokens, other=0.0) * scale
        grad_probs += tl.where(expert[None, :] == chosen[:, None], grad[:, None], 0.0)
    dot = tl.sum(probs * grad_probs, axis=1)
    tl.store(grad_logits + place, probs * (grad_probs - dot[:, None]), mask=mask)


def _grid(num_tokens: int) -> Any:
    return lambda meta: (triton.cdiv(num_tokens, meta["BLOCK"]),)


class Gate(torch.autograd.Function):
    """(logits, num_topk, num_groups, num_groups_kept, scale) -> (idx, weight)."""

    @staticmethod
    def forward(ctx, logits_TE, num_topk, num_groups, num_groups_kept, scale):
        """One launch."""
        num_tokens, num_experts = logits_TE.shape
        idx_TK = torch.empty(num_tokens, num_topk, dtype=torch.int32, device=logits_TE.device)
        weight_TK = torch.empty(num_tokens, num_topk, dtype=torch.float32, device=logits_TE.device)
        if num_groups_kept == num_groups:
            num_groups = num_groups_kept = 1
        shape = (num_experts, num_groups, num_groups_kept, num_topk)
        tensors = (logits_TE, idx_TK, weight_TK)
        forward_kernel[_grid(num_tokens)](tensors, num_tokens, scale, SHAPE=shape)
        ctx.scale = scale
        ctx.save_for_backward(logits_TE, idx_TK)
        ctx.mark_non_differentiable(idx_TK)
        return idx_TK, weight_TK

    @staticmethod
    def backward(ctx, _, grad_weight_TK):
        """One launch."""
        logits_TE, idx_TK = ctx.saved_tensors
        (num_tokens, num_experts), num_topk = logits_TE.shape, idx_TK.shape[1]
        grad_logits_TE = torch.empty_like(logits_TE)
        tensors = (logits_TE, idx_TK, grad_weight_TK.contiguous(), grad_logits_TE)
        backward_kernel[_grid(num_tokens)](tensors, num_tokens, ctx.scale, SHAPE=(num_experts, num_topk))
        return grad_logits_TE, None, None, None, None


def gate(
    logits_TE: Tensor, num_topk: int, num_groups: int, num_groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    """moe_gate without renormalisation, for contiguous logits."""
    return Gate.apply(logits_TE, num_topk, num_groups, num_groups_kept, scale)
