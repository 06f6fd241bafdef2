"""moe_gate: softmax over all experts, keep the best groups, pick K experts (DeepSeek-V2 eqs 20-22, 2.2.2).

Selection compares logits in float32: softmax is monotonic, and probabilities of far experts tie at zero
where their logits do not. A group scores by its best expert (V2's rule; V3 sums the two best).
"""

from typing import Any

import torch
from torch import Tensor

from dscoder.ops.library import (
    FLOATS,
    accumulate_dtype,
    check_at_least,
    check_number,
    check_tensor,
    define_gradient,
    define_op,
    refuse_second_derivative,
)
from dscoder.ops.moe_balance_loss import (
    balance_buffers,
    balance_reference,
    balance_reference_gradient,
    check_groups,
    check_sequences,
)
from dscoder.runtime import native


def moe_gate(
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Route each token to K experts.

    The weights are the chosen experts' shares of the softmax over all E experts; `renormalize` divides the K
    of them by their sum; `scale` multiplies last. Only experts in the `num_groups_kept` groups whose best
    expert has the largest logit can be chosen; a group is E / num_groups neighbouring experts.

    Returns:
        idx_TK (int32) and weight_TK (float32; float64 for float64 logits), largest weight first. Equal
        logits go to the smaller expert, equal groups to the smaller group; a NaN counts as the largest and
        makes its row's weights NaN. A row's experts are always distinct. Differentiable in the weights.
    """
    op = "moe_gate"
    _check_routing(op, logits_TE, num_topk, num_groups, num_groups_kept)
    check_number(op, "scale", scale)
    idx_TK: Tensor
    weight_TK: Tensor
    weight_TK, idx_TK = torch.ops.dscoder.moe_gate.default(
        logits_TE, num_topk, num_groups, num_groups_kept, scale, renormalize
    )
    return idx_TK, weight_TK


def moe_gate_with_balance(
    logits_TE: Tensor,
    *,
    num_topk: int,
    num_groups: int = 1,
    num_groups_kept: int = 1,
    scale: float = 1.0,
    renormalize: bool = False,
    num_sequences: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_gate`, and the terms of `moe_balance_terms` for its choice, in one pass over the logits.

    Equal to `moe_gate(logits_TE, ...)` and `moe_balance_terms(logits_TE.softmax(-1), idx_TK, ...)`; the
    tokens are `num_sequences` sequences of one length, one after the other.

    Returns:
        idx_TK and weight_TK as of `moe_gate`, and the unweighted expert-, device- and communication-level
        terms [3] in the dtype of the weights. Differentiable in the weights and the terms.
    """
    op = "moe_gate_with_balance"
    _check_routing(op, logits_TE, num_topk, num_groups, num_groups_kept)
    check_number(op, "scale", scale)
    num_sequences = check_sequences(op, logits_TE.shape[0], num_sequences)
    idx_TK: Tensor
    weight_TK: Tensor
    terms_3: Tensor
    weight_TK, idx_TK, terms_3, _ = torch.ops.dscoder.moe_gate_with_balance.default(
        logits_TE, num_topk, num_groups, num_groups_kept, scale, renormalize, num_sequences
    )
    return idx_TK, weight_TK, terms_3


def _check_routing(op: str, logits_TE: Tensor, num_topk: int, num_groups: int, num_groups_kept: int) -> None:
    check_tensor(op, "logits", logits_TE, num_dims=2, dtypes=FLOATS)
    num_experts = logits_TE.shape[1]
    check_at_least(op, "num_topk", num_topk, 1)
    check_groups(op, num_experts, num_groups, num_groups_kept)
    num_reachable = num_experts // num_groups * num_groups_kept
    if num_topk > num_reachable:
        raise ValueError(
            f"{op}: num_topk must be <= {num_reachable} (experts in the kept groups), got {num_topk}"
        )


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of each row, largest first, ties to the smaller position."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _select(logits_TE: Tensor, num_topk: int, num_groups: int, num_groups_kept: int) -> Tensor:
    if num_groups_kept == num_groups:
        return _largest(logits_TE, num_topk)
    num_tokens, num_experts = logits_TE.shape
    group_width = num_experts // num_groups
    grouped = logits_TE.view(num_tokens, num_groups, group_width)
    # Kept groups in ascending order, so that a tie between experts of two groups goes to the smaller one.
    kept = _largest(grouped.amax(dim=-1), num_groups_kept).sort(dim=-1).values
    experts = kept.unsqueeze(-1) * group_width + torch.arange(group_width, device=logits_TE.device)
    experts = experts.flatten(1)
    return experts.gather(1, _largest(logits_TE.gather(1, experts), num_topk))


def _forward(
    logits_TE: Tensor, num_topk: int, num_groups: int, num_groups_kept: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    logits = logits_TE.to(accumulate_dtype(logits_TE.dtype)).contiguous()
    idx_TK = _select(logits, num_topk, num_groups, num_groups_kept)
    # Softmax over all experts, the dropped groups included.
    weight_TK = logits.softmax(dim=-1).gather(1, idx_TK)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK * scale, idx_TK.to(torch.int32)


def _backward(
    grad_weight_TK: Tensor, logits_TE: Tensor, idx_TK: Tensor, scale: float, renormalize: bool
) -> Tensor:
    probs_TE = logits_TE.to(accumulate_dtype(logits_TE.dtype)).softmax(dim=-1)
    idx = idx_TK.long()
    chosen_TK = probs_TE.gather(1, idx)
    grad_TK = grad_weight_TK * scale
    if renormalize:
        # weight = chosen / total, so d chosen = (d weight - sum(d weight * weight)) / total.
        total = chosen_TK.sum(dim=-1, keepdim=True)
        grad_TK = (grad_TK - (grad_TK * chosen_TK).sum(dim=-1, keepdim=True) / total) / total
    grad_TK = grad_TK * chosen_TK
    grad_TE = -probs_TE * grad_TK.sum(dim=-1, keepdim=True)
    return grad_TE.scatter_add_(1, idx, grad_TK).to(logits_TE.dtype)


def _forward_kernel(
    logits_TE: Tensor, num_topk: int, num_groups: int, num_groups_kept: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    if logits_TE.dtype == torch.float64:
        return _forward(logits_TE, num_topk, num_groups, num_groups_kept, scale, renormalize)
    weight_TK, idx_TK = _forward_fake(logits_TE, num_topk)
    logits = logits_TE.float().contiguous()
    native._C.moe_gate_forward(logits, idx_TK, weight_TK, num_groups, num_groups_kept, scale, renormalize)
    return weight_TK, idx_TK


def _backward_kernel(
    grad_weight_TK: Tensor, logits_TE: Tensor, idx_TK: Tensor, scale: float, renormalize: bool
) -> Tensor:
    if logits_TE.dtype == torch.float64:
        return _backward(grad_weight_TK, logits_TE, idx_TK, scale, renormalize)
    logits = logits_TE.float().contiguous()
    grad_logits = torch.empty_like(logits)
    grad_weight = grad_weight_TK.contiguous()
    native._C.moe_gate_backward(logits, idx_TK, grad_weight, grad_logits, scale, renormalize)
    return grad_logits.to(logits_TE.dtype)


def _forward_fake(logits_TE: Tensor, num_topk: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], num_topk)
    weight_dtype = accumulate_dtype(logits_TE.dtype)
    return logits_TE.new_empty(shape, dtype=weight_dtype), logits_TE.new_empty(shape, dtype=torch.int32)


def _backward_fake(_grad: Tensor, logits_TE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _, _, _, ctx.scale, ctx.renormalize = inputs
    ctx.save_for_backward(logits_TE, output[1])


def _differentiate(ctx: Any, grad_weight_TK: Tensor, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("moe_gate")
    logits_TE, idx_TK = ctx.saved_tensors
    grad_logits = torch.ops.dscoder.moe_gate_backward.default(
        grad_weight_TK, logits_TE, idx_TK, ctx.scale, ctx.renormalize
    )
    return grad_logits, None, None, None, None, None


define_op(
    "moe_gate(Tensor logits, int num_topk, int num_groups, int num_groups_kept, float scale,"
    " bool renormalize) -> (Tensor weight, Tensor idx)",
    reference=_forward,
    kernel=_forward_kernel,
    fake=_forward_fake,
)
define_op(
    "moe_gate_backward(Tensor grad_weight, Tensor logits, Tensor idx, float scale, bool renormalize)"
    " -> Tensor",
    reference=_backward,
    kernel=_backward_kernel,
    fake=_backward_fake,
)
define_gradient("moe_gate", save=_save, backward=_differentiate)


# ---- with the balance terms ----


def _balanced_forward(
    logits_TE: Tensor,
    num_topk: int,
    num_groups: int,
    num_groups_kept: int,
    scale: float,
    renormalize: bool,
    num_sequences: int,
) -> tuple[Tensor, ...]:
    weight_TK, idx_TK = _forward(logits_TE, num_topk, num_groups, num_groups_kept, scale, renormalize)
    probs_TE = logits_TE.to(weight_TK.dtype).softmax(dim=-1)
    terms_3, load_3BE = balance_reference(probs_TE, idx_TK, num_sequences, num_groups, num_groups_kept)
    return weight_TK, idx_TK, terms_3, load_3BE


def _balanced_backward(
    grad_weight_TK: Tensor,
    grad_terms: Tensor,
    logits_TE: Tensor,
    idx_TK: Tensor,
    load_3BE: Tensor,
    scale: float,
    renormalize: bool,
) -> Tensor:
    dtype = load_3BE.dtype
    grad_TE = _backward(grad_weight_TK, logits_TE.to(dtype), idx_TK, scale, renormalize)
    probs_TE = logits_TE.to(dtype).softmax(dim=-1)
    grad_probs = balance_reference_gradient(grad_terms, load_3BE, logits_TE.shape[0], dtype)
    grad_TE += probs_TE * (grad_probs - (probs_TE * grad_probs).sum(dim=-1, keepdim=True))
    return grad_TE.to(logits_TE.dtype)


def _balanced_forward_kernel(
    logits_TE: Tensor,
    num_topk: int,
    num_groups: int,
    num_groups_kept: int,
    scale: float,
    renormalize: bool,
    num_sequences: int,
) -> tuple[Tensor, ...]:
    if logits_TE.dtype == torch.float64:
        options = (num_topk, num_groups, num_groups_kept, scale, renormalize, num_sequences)
        return _balanced_forward(logits_TE, *options)
    weight_TK, idx_TK = _forward_fake(logits_TE, num_topk)
    logits = logits_TE.float().contiguous()
    buffers = balance_buffers(logits, num_sequences, num_groups)
    native._C.moe_gate_with_balance_forward(
        logits, idx_TK, weight_TK, buffers, num_groups, num_groups_kept, scale, renormalize
    )
    *_, terms_3, load_3BE = buffers
    return weight_TK, idx_TK, terms_3, load_3BE


def _balanced_backward_kernel(
    grad_weight_TK: Tensor,
    grad_terms: Tensor,
    logits_TE: Tensor,
    idx_TK: Tensor,
    load_3BE: Tensor,
    scale: float,
    renormalize: bool,
) -> Tensor:
    if logits_TE.dtype == torch.float64:
        saved = (logits_TE, idx_TK, load_3BE)
        return _balanced_backward(grad_weight_TK, grad_terms, *saved, scale, renormalize)
    logits = logits_TE.float().contiguous()
    grad_logits = torch.empty_like(logits)
    grads = (grad_weight_TK.contiguous(), grad_terms.contiguous())
    native._C.moe_gate_with_balance_backward(logits, idx_TK, grads, load_3BE, grad_logits, scale, renormalize)
    return grad_logits.to(logits_TE.dtype)


def _balanced_fake(logits_TE: Tensor, num_topk: int, *options: Any) -> tuple[Tensor, ...]:
    weight_TK, idx_TK = _forward_fake(logits_TE, num_topk)
    load_shape = (3, options[-1], logits_TE.shape[1])
    return weight_TK, idx_TK, weight_TK.new_empty(3), weight_TK.new_empty(load_shape)


def _balanced_backward_fake(_grad: Tensor, _grad_terms: Tensor, logits_TE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _balanced_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, _, _, ctx.scale, ctx.renormalize, _ = inputs
    _, idx_TK, _, load_3BE = output
    ctx.save_for_backward(logits_TE, idx_TK, load_3BE)
    ctx.mark_non_differentiable(idx_TK, load_3BE)


def _balanced_differentiate(
    ctx: Any, grad_weight_TK: Tensor | None, _idx: None, grad_terms: Tensor | None, _load: None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("moe_gate_with_balance")
    logits_TE, idx_TK, load_3BE = ctx.saved_tensors
    if grad_weight_TK is None:
        grad_weight_TK = load_3BE.new_zeros(idx_TK.shape)
    if grad_terms is None:
        grad_terms = load_3BE.new_zeros(3)
    grad_logits = torch.ops.dscoder.moe_gate_with_balance_backward.default(
        grad_weight_TK, grad_terms, logits_TE, idx_TK, load_3BE, ctx.scale, ctx.renormalize
    )
    return grad_logits, None, None, None, None, None, None


define_op(
    "moe_gate_with_balance(Tensor logits, int num_topk, int num_groups, int num_groups_kept, float scale,"
    " bool renormalize, SymInt num_sequences) -> (Tensor weight, Tensor idx, Tensor terms, Tensor load)",
    reference=_balanced_forward,
    kernel=_balanced_forward_kernel,
    fake=_balanced_fake,
)
define_op(
    "moe_gate_with_balance_backward(Tensor grad_weight, Tensor grad_terms, Tensor logits, Tensor idx,"
    " Tensor load, float scale, bool renormalize) -> Tensor",
    reference=_balanced_backward,
    kernel=_balanced_backward_kernel,
    fake=_balanced_backward_fake,
)
define_gradient("moe_gate_with_balance", save=_balanced_save, backward=_balanced_differentiate)
