"""moe_balance_loss: the three auxiliary losses that spread tokens (DeepSeek-V2 eqs 23-31).

For a sequence of T tokens, with P_i the mean probability of expert i and count_i its tokens:
    expert         sum_i f_i P_i,        f_i = E / (K T) * count_i
    device         sum_d f'_d P'_d,      f'_d = mean of f_i over group d, P'_d = sum of P_i over group d
    communication  sum_d f''_d P'_d,     f''_d = G / (M T) * tokens with a choice in group d, M groups kept
A group holds the experts of one device. The counts carry no gradient. Who gates with `moe_gate` takes the
terms from `moe_gate_with_balance`, which has the probabilities at hand.
"""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    check_at_least,
    check_devices,
    check_number,
    check_shape,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
)
from dscoder.runtime import native


def moe_balance_loss(
    probs_TE: Tensor,
    idx_TK: Tensor,
    *,
    num_sequences: int = 1,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
) -> Tensor:
    """The sum of the three terms of `moe_balance_terms`, weighted by the last three arguments.

    Returns:
        A float32 scalar (float64 for float64 probs), differentiable in probs_TE.
    """
    for name, weight in (("expert", expert), ("device", device), ("communication", communication)):
        check_number("moe_balance_loss", name, weight)
    num_sequences = _check(probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept)
    loss: Tensor
    loss, _ = torch.ops.dscoder.moe_balance_loss.default(
        probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept, (expert, device, communication)
    )
    return loss.squeeze(0)


def moe_balance_terms(
    probs_TE: Tensor,
    idx_TK: Tensor,
    *,
    num_sequences: int = 1,
    num_groups: int = 1,
    num_groups_kept: int = 1,
) -> Tensor:
    """The unweighted expert-, device- and communication-level terms.

    Each is taken per sequence (T = num_sequences * S, sequences one after the other) and averaged over the
    sequences; all are 1 under perfect balance. `probs_TE` is the softmax over all experts, `idx_TK` the
    gate's choice before any token is dropped; an index outside [0, E) counts for no expert.

    Returns:
        float32 [3] (float64 for float64 probs), differentiable in probs_TE.
    """
    num_sequences = _check(probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept)
    terms: Tensor
    terms, _ = torch.ops.dscoder.moe_balance_loss.default(
        probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept, None
    )
    return terms


def _check(
    probs_TE: Tensor, idx_TK: Tensor, num_sequences: int, num_groups: int, num_groups_kept: int
) -> int:
    op = "moe_balance_loss"
    check_tensor(op, "probs", probs_TE, num_dims=2, dtypes=FLOATS)
    check_tensor(op, "idx", idx_TK, num_dims=2, dtypes=(torch.int32,))
    check_shape(op, "idx", idx_TK, (probs_TE.shape[0], idx_TK.shape[1]))
    check_devices(op, probs=probs_TE, idx=idx_TK)
    check_at_least(op, "num_topk", idx_TK.shape[1], 1)
    num_tokens, num_experts = probs_TE.shape
    check_groups(op, num_experts, num_groups, num_groups_kept)
    return check_sequences(op, num_tokens, num_sequences)


def check_sequences(op: str, num_tokens: int, num_sequences: int) -> int:
    """num_sequences, 1 where there are no tokens; ValueError unless they are so many of one length."""
    check_at_least(op, "num_sequences", num_sequences, 1)
    if num_tokens % num_sequences:
        raise ValueError(
            f"{op}: num_tokens must be a multiple of num_sequences, got {num_tokens} and {num_sequences}"
        )
    # Any number divides no tokens, and a row of loads for each would be as many as the caller likes.
    return num_sequences if num_tokens else 1


def check_groups(op: str, num_experts: int, num_groups: int, num_groups_kept: int) -> None:
    """ValueError unless the experts are so many groups of one width, of which so many may be kept."""
    check_at_least(op, "num_experts", num_experts, 1)
    check_at_least(op, "num_groups", num_groups, 1)
    check_at_least(op, "num_groups_kept", num_groups_kept, 1)
    if num_experts % num_groups:
        raise ValueError(
            f"{op}: num_experts must be a multiple of num_groups, got {num_experts} and {num_groups}"
        )
    if num_groups_kept > num_groups:
        raise ValueError(f"{op}: num_groups_kept must be <= num_groups {num_groups}, got {num_groups_kept}")


def _loads(
    idx: Tensor, num_topk: int, num_experts: int, num_groups: int, num_groups_kept: int, dtype: torch.dtype
) -> Tensor:
    """idx [B, S * K] -> the factor of P_i in each term, [3, B, E]: f_i, f' of i's group, f'' of i's group."""
    num_sequences, num_choices = idx.shape
    length = max(num_choices // num_topk, 1)
    group_width = num_experts // num_groups
    # Column E (group G) takes the choices that count for nobody.
    idx = torch.where((idx < 0) | (idx >= num_experts), num_experts, idx).long()
    # Counted in integers: float32 stops at 2^24.
    count_BE = idx.new_zeros(num_sequences, num_experts + 1).scatter_add_(1, idx, torch.ones_like(idx))
    f_expert = count_BE[:, :num_experts].to(dtype) * (num_experts / (num_topk * length))
    f_device = f_expert.view(num_sequences, num_groups, group_width).mean(dim=-1)
    is_sent = idx.new_zeros(num_sequences * length, num_groups + 1, dtype=torch.bool)
    if num_choices:
        is_sent.scatter_(1, (idx // group_width).clamp(max=num_groups).view(-1, num_topk), True)
    num_sent = is_sent.view(num_sequences, length, -1).sum(dim=1)[:, :num_groups]
    f_sent = num_sent.to(dtype) * (num_groups / (num_groups_kept * length))
    return torch.stack([f_expert, *(f.repeat_interleave(group_width, dim=1) for f in (f_device, f_sent))])


def balance_reference(
    probs_TE: Tensor,
    idx_TK: Tensor,
    num_sequences: int,
    num_groups: int,
    num_groups_kept: int,
    weights: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The terms [N], and load_NBE: the gradient of each in every probability of a sequence.

    N is 3, or 1 where there are weights: the terms' sum.
    """
    num_tokens, num_experts = probs_TE.shape
    length = num_tokens // num_sequences
    dtype = accumulate_dtype(probs_TE.dtype)
    idx = idx_TK.reshape(num_sequences, length * idx_TK.shape[1])
    load_NBE = _loads(idx, idx_TK.shape[1], num_experts, num_groups, num_groups_kept, dtype)
    # Every term is linear in the probabilities: load / (S * B) is its gradient in every token's row.
    load_NBE /= max(num_tokens, 1)
    if weights is not None:
        expert, device, communication = weights
        load_NBE = (load_NBE[0] * expert + load_NBE[1] * device + load_NBE[2] * communication).unsqueeze(0)
    total_BE = probs_TE.reshape(num_sequences, length, num_experts).sum(dim=1, dtype=dtype)
    return (load_NBE * total_BE).sum(dim=(1, 2)), load_NBE


def balance_reference_gradient(
    grad_terms: Tensor, load_NBE: Tensor, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of probs_TE: the same row for all tokens of a sequence."""
    _, num_sequences, num_experts = load_NBE.shape
    grad_BE = torch.einsum("i,ibe->be", grad_terms.to(load_NBE.dtype), load_NBE).to(dtype)
    length = num_tokens // num_sequences
    grad = grad_BE.unsqueeze(1).expand(num_sequences, length, num_experts)
    return grad.reshape(num_tokens, num_experts)


def balance_buffers(
    tokens_TE: Tensor, num_sequences: int, num_groups: int, num_terms: int = 3
) -> tuple[Tensor, ...]:
    """What the kernels fill for these tokens: four tensors of scratch, the terms and load_NBE."""
    num_tokens, num_experts = tokens_TE.shape
    num_chunks, num_slices = native._C.moe_balance_plan(num_tokens, num_experts, num_sequences, num_groups)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return tokens_TE.new_empty(shape, dtype=dtype)

    return (
        empty(num_sequences, num_chunks, num_experts),
        empty(num_sequences, num_chunks, num_experts + 2 * num_groups, dtype=torch.int32),
        empty(num_sequences, num_groups, num_slices, num_terms),
        empty(1, dtype=torch.int32),
        empty(num_terms),
        empty(num_terms, num_sequences, num_experts),
    )


def _forward_kernel(
    probs_TE: Tensor,
    idx_TK: Tensor,
    num_sequences: int,
    num_groups: int,
    num_groups_kept: int,
    weights: list[float] | None,
) -> tuple[Tensor, Tensor]:
    if probs_TE.dtype == torch.float64:
        return balance_reference(probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept, weights)
    buffers = balance_buffers(probs_TE, num_sequences, num_groups, 3 if weights is None else 1)
    native._C.moe_balance_loss_forward(
        probs_TE.contiguous(), idx_TK.contiguous(), buffers, num_groups, num_groups_kept, weights
    )
    *_, terms, load_NBE = buffers
    return terms, load_NBE


def _backward_kernel(grad_terms: Tensor, load_NBE: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return balance_reference_gradient(grad_terms, load_NBE, num_tokens, dtype)
    grad_probs = _backward_fake(grad_terms, load_NBE, num_tokens, dtype)
    native._C.moe_balance_loss_backward(grad_terms.contiguous(), load_NBE, grad_probs)
    return grad_probs


def _forward_fake(
    probs_TE: Tensor, _idx: Tensor, num_sequences: int, _groups: int, _kept: int, weights: list[float] | None
) -> tuple[Tensor, Tensor]:
    num_terms = 3 if weights is None else 1
    terms = probs_TE.new_empty(num_terms, dtype=accumulate_dtype(probs_TE.dtype))
    return terms, terms.new_empty(num_terms, num_sequences, probs_TE.shape[1])


def _backward_fake(_grad: Tensor, load_NBE: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return load_NBE.new_empty((num_tokens, load_NBE.shape[2]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_tokens, ctx.dtype = inputs[0].shape[0], inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_terms: Tensor, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("moe_balance_loss")
    (load_NBE,) = ctx.saved_tensors
    grad_probs = torch.ops.dscoder.moe_balance_loss_backward.default(
        grad_terms, load_NBE, ctx.num_tokens, ctx.dtype
    )
    return grad_probs, None, None, None, None, None


define_op(
    "moe_balance_loss(Tensor probs, Tensor idx, SymInt num_sequences, int num_groups, int num_groups_kept,"
    " float[]? weights) -> (Tensor terms, Tensor load)",
    reference=balance_reference,
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    "moe_balance_loss_backward(Tensor grad_terms, Tensor load, SymInt num_tokens, ScalarType dtype)"
    " -> Tensor",
    reference=balance_reference_gradient,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("moe_balance_loss", save=_save, backward=_differentiate)
