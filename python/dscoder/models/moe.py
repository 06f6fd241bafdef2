"""DeepSeekMoE (DeepSeek-V2 section 2.2): routed experts by top-K gating, shared experts, token dropping."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import MoeConfig
from dscoder.models.mlp import Mlp
from dscoder.models.placement import Placement

DROPPED = -1  # the expert index of a choice that gets no expert


def drop_over_capacity(
    idx_TK: Tensor,
    affinity_TK: Tensor,
    *,
    config: MoeConfig,
    capacity_factor: float,
    never_dropped_T: Tensor,
) -> Tensor:
    """Device-level token dropping (DeepSeek-V2 section 2.2.4): `idx_TK` with the dropped choices at -1.

    A device (a group of experts) computes at most capacity_factor times its even share of the T * K choices.
    Of those sent to it, the ones with the lowest affinity go, the later ones among equals. Choices of
    `never_dropped_T` tokens stay, and take up capacity before all others.
    """
    num_choices = idx_TK.numel()  # T * K, the length of what follows
    capacity = int(capacity_factor * num_choices / config.num_groups)
    is_protected = never_dropped_T.repeat_interleave(config.num_topk)
    # Affinities are finite, so infinity sorts before every choice that may be dropped.
    sort_key = affinity_TK.detach().flatten().masked_fill(is_protected, torch.inf)
    device = idx_TK.flatten() // (config.num_experts // config.num_groups)
    by_affinity = sort_key.argsort(descending=True, stable=True)
    by_device = device[by_affinity].sort(stable=True)
    order = by_affinity[by_device.indices]
    starts_G = torch.searchsorted(
        by_device.values, torch.arange(config.num_groups, dtype=by_device.values.dtype, device=idx_TK.device)
    )
    rank = torch.arange(num_choices, device=idx_TK.device) - starts_G[by_device.values]
    is_dropped = torch.zeros_like(is_protected).index_copy(0, order, rank >= capacity) & ~is_protected
    return idx_TK.masked_fill(is_dropped.view_as(idx_TK), DROPPED)


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in float32 (or wider) whatever the weights' type, and under autocast: near-ties choose."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    is_narrow = x_TD.dtype == weight_ED.dtype != wide
    if is_narrow and not x_TD.is_cpu and not torch.is_grad_enabled():
        # The product of two bfloat16 numbers is exact in float32, which tensor cores add in.
        return torch.mm(x_TD, weight_ED.t(), out_dtype=wide)
    # Autocast would cast the product back.
    with torch.autocast("cpu" if x_TD.is_meta else x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide))


class Experts(nn.Module):
    """The routed experts' weights, one matrix stack each for gate and up, and for down."""

    def __init__(
        self,
        width: int,
        config: MoeConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_experts, expert_width = config.num_experts, config.expert_width
        self.gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * expert_width, width, device=device, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(num_experts, width, expert_width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, handle: ops.PermuteHandle) -> Tensor:
        """Tokens -> rows in expert order."""
        return ops.moe_experts(x_TD, self.gate_up, self.down, handle)


class Moe(nn.Module):
    """sum over K chosen experts of weight * FFN(x), plus the shared experts as one MLP."""

    def __init__(
        self,
        width: int,
        config: MoeConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(width, config.num_experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts(width, config, device=device, dtype=dtype)
        self.shared = (
            Mlp(width, config.num_shared_experts * config.expert_width, device=device, dtype=dtype)
            if config.num_shared_experts
            else None
        )

    def forward(
        self, x_TD: Tensor, placement: Placement, onto_TD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x_TD -> [T, D], added to `onto_TD` in place where there is one, and balance terms.

        Those are [3], unweighted, and there with gradients alone: in training mode, or as `placement` says.
        """
        config = self.config
        logits_TE = gate_logits(x_TD, self.gate.weight)
        idx_TK, weight_TK, terms_3 = self._route(logits_TE, placement)
        if placement.never_dropped_T is not None and config.capacity_factor is not None:
            idx_TK = drop_over_capacity(
                idx_TK,
                self._affinity(logits_TE, idx_TK, weight_TK),
                config=config,
                capacity_factor=config.capacity_factor,
                never_dropped_T=placement.never_dropped_T,
            )
        handle = ops.moe_permute_maps(idx_TK, num_experts=config.num_experts)
        out_TD = ops.moe_unpermute(self.experts(x_TD, handle), weight_TK, handle)
        if onto_TD is not None:
            out_TD = onto_TD.add_(out_TD)
        if self.shared is None:
            return out_TD, terms_3
        if onto_TD is not None:
            return self.shared(x_TD, out_TD), terms_3
        return out_TD + self.shared(x_TD), terms_3

    def _affinity(self, logits_TE: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The chosen experts' probabilities, or a multiple that orders all choices in the same way."""
        mantissa, exponent = math.frexp(self.config.scale)
        # Times another number two probabilities may round to one weight, and the later choice would go.
        if mantissa == 0.5 and exponent > 0 and not self.config.renormalize:
            return weight_TK
        return logits_TE.softmax(dim=-1).gather(1, idx_TK.long())

    def _route(self, logits_TE: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor | None]:
        config = self.config
        balance = config.balance
        is_weighted = max(balance.expert, balance.device, balance.communication) > 0
        # Without a weight or a gradient the balance terms would be computed for nobody.
        is_wanted = self.training or placement.has_balance
        if not (is_weighted and is_wanted and torch.is_grad_enabled()):
            idx_TK, weight_TK = ops.moe_gate(
                logits_TE,
                num_topk=config.num_topk,
                num_groups=config.num_groups,
                num_groups_kept=config.num_groups_kept,
                scale=config.scale,
                renormalize=config.renormalize,
            )
            return idx_TK, weight_TK, None
        return ops.moe_gate_with_balance(
            logits_TE,
            num_topk=config.num_topk,
            num_groups=config.num_groups,
            num_groups_kept=config.num_groups_kept,
            scale=config.scale,
            renormalize=config.renormalize,
            num_sequences=max(placement.num_sequences, 1),  # no rows are as balanced as an empty one
        )
