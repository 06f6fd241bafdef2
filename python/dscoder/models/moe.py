"""DeepSeekMoE (DeepSeek-V2 section 2.2): routed experts by top-K gating, shared experts, token dropping."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where the tokens of one layer go."""

    idx_TK: Tensor  # int32, of all experts; DROPPED for a dropped choice
    weight_TK: Tensor  # float32, differentiable
    terms_3: Tensor | None  # balance terms, unweighted


def count_choices(idx_TK: Tensor, num_experts: int) -> Tensor:
    """int32 [E]: how many choices each expert has; dropped ones are counted nowhere."""
    loads = idx_TK.new_zeros(num_experts + 1)  # the first is of the dropped
    loads.scatter_add_(0, idx_TK.flatten().long() - DROPPED, torch.ones_like(idx_TK.flatten()))
    return loads[1:]


class Experts(nn.Module):
    """The routed experts' weights, one matrix stack each for gate and up, and for down.

    `num_local` of them, where other ranks hold the rest.
    """

    def __init__(
        self,
        width: int,
        config: MoeConfig,
        *,
        num_local: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_experts, expert_width = num_local or config.num_experts, config.expert_width
        self.gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * expert_width, width, device=device, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(num_experts, width, expert_width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, handle: ops.PermuteHandle) -> Tensor:
        """Tokens -> rows in expert order."""
        return ops.moe_experts(x_TD, self.gate_up, self.down, handle)


class Moe(nn.Module):
    """sum over K chosen experts of weight * FFN(x), plus the shared experts as one MLP.

    With `expert_parallel` this rank holds its share of the experts, and tokens travel to the others.
    """

    def __init__(
        self,
        width: int,
        config: MoeConfig,
        *,
        expert_parallel: ops.ExpertParallel | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.expert_parallel = expert_parallel
        self.gate = nn.Linear(width, config.num_experts, bias=False, device=device, dtype=dtype)
        num_local = None if expert_parallel is None else expert_parallel.num_local_experts
        self.experts = Experts(width, config, num_local=num_local, device=device, dtype=dtype)
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
        routing = self.route(x_TD, placement)
        if onto_TD is None or self.shared is None:
            out_TD = self.mix(x_TD, routing, self.shared)
            return out_TD if onto_TD is None else onto_TD.add_(out_TD), routing.terms_3
        onto_TD.add_(self.mix(x_TD, routing, None))
        return self.shared(x_TD, onto_TD), routing.terms_3

    def route(self, x_TD: Tensor, placement: Placement) -> Routing:
        """Choose each token's experts and drop what is over capacity."""
        config = self.config
        logits_TE = gate_logits(x_TD, self.gate.weight)
        idx_TK, weight_TK, terms_3 = self._choose(logits_TE, placement)
        if placement.never_dropped_T is not None and config.capacity_factor is not None:
            idx_TK = drop_over_capacity(
                idx_TK,
                self._affinity(logits_TE, idx_TK, weight_TK),
                config=config,
                capacity_factor=config.capacity_factor,
                never_dropped_T=placement.never_dropped_T,
            )
        return Routing(idx_TK=idx_TK, weight_TK=weight_TK, terms_3=terms_3)

    def mix(self, x_TD: Tensor, routing: Routing, shared: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The routed experts' sum for each token, plus `shared` of it, computed while the tokens travel."""
        group = self.expert_parallel
        if group is None:
            handle = ops.moe_permute_maps(routing.idx_TK, num_experts=self.config.num_experts)
            out_TD = ops.moe_unpermute(self.experts(x_TD, handle), routing.weight_TK, handle)
            return out_TD if shared is None else out_TD + shared(x_TD)
        outward = group.start_dispatch(x_TD, routing.idx_TK, routing.weight_TK)
        shared_TD = None if shared is None else shared(x_TD)
        x_SD, dispatched = outward.wait()
        y_MD = self.experts(x_SD, dispatched.maps)
        y_SD = ops.moe_unpermute(y_MD, dispatched.weight_SK, dispatched.maps)
        out_TD = group.start_combine(y_SD, dispatched).wait()
        return out_TD if shared_TD is None else out_TD + shared_TD

    def _affinity(self, logits_TE: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The chosen experts' probabilities, or a multiple that orders all choices in the same way."""
        mantissa, exponent = math.frexp(self.config.scale)
        # Times another number two probabilities may round to one weight, and the later choice would go.
        if mantissa == 0.5 and exponent > 0 and not self.config.renormalize:
            return weight_TK
        return logits_TE.softmax(dim=-1).gather(1, idx_TK.long())

    def _choose(self, logits_TE: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor | None]:
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
