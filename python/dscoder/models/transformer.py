"""The decoder of both families: pre-norm blocks of attention and an MLP or experts, then norm and head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import GqaConfig, ModelConfig
from dscoder.config.parallel import Recompute
from dscoder.models.attention import GqaAttention
from dscoder.models.cache import Cache
from dscoder.models.init import init_weights
from dscoder.models.mla import LatentAttention
from dscoder.models.mlp import Mlp
from dscoder.models.moe import Moe, Routing, count_choices
from dscoder.models.norm import RMSNorm
from dscoder.models.placement import Placement, place
from dscoder.models.recompute import recomputed


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What a forward gives before the head."""

    hidden_BSD: Tensor  # after the final norm
    balance: Tensor  # float32 scalar, weighted and summed over layers; 0 unless trained, with experts
    balance_terms_3: Tensor | None  # unweighted expert, device, communication; mean over layers; detached
    # int32, in training mode: choices by layer with experts and expert; what is missing from T * K is dropped
    loads_LE: Tensor | None = None


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) or x + moe(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer_idx: int,
        expert_parallel: ops.ExpertParallel | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute: Recompute = "none"  # may be changed at any time
        width, attention = config.width, config.attention
        self.attention_norm = RMSNorm(width, eps=config.norm_eps, device=device, dtype=dtype)
        self.attention: GqaAttention | LatentAttention
        if isinstance(attention, GqaConfig):
            self.attention = GqaAttention(config, attention, layer_idx=layer_idx, device=device, dtype=dtype)
        else:
            self.attention = LatentAttention(
                config, attention, layer_idx=layer_idx, device=device, dtype=dtype
            )
        self.mlp_norm = RMSNorm(width, eps=config.norm_eps, device=device, dtype=dtype)
        self.is_moe = config.is_moe_layer(layer_idx)
        if self.is_moe:
            assert config.moe is not None
            self.moe = Moe(width, config.moe, expert_parallel=expert_parallel, device=device, dtype=dtype)
        else:
            self.mlp = Mlp(width, config.mlp_width, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, placement: Placement) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x_TD -> [T, D], in place with a cache; and the balance terms [3] and loads [E] of its experts."""
        if placement.cache is not None:
            self._add_to(x_TD, placement)
            return x_TD, None, None
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._run(x_TD, placement)
        if self.recompute == "selective" and self.is_moe:
            return self._run_keeping_experts(x_TD, placement)
        return recomputed(lambda x_TD: self._run(x_TD, placement), x_TD)

    def _run(self, x_TD: Tensor, placement: Placement) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_TD, normed_TD = self._attend(x_TD, placement)
        if not self.is_moe:
            return x_TD + self.mlp(normed_TD), None, None
        routing = self.moe.route(normed_TD, placement)
        out_TD = x_TD + self.moe.mix(normed_TD, routing, self.moe.shared)
        return out_TD, routing.terms_3, self._loads(routing)

    def _run_keeping_experts(
        self, x_TD: Tensor, placement: Placement
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `_run`; what the routed experts computed is kept, the rest is computed again for gradients."""
        moe = self.moe

        def until_routed(x_TD: Tensor) -> tuple[Tensor, Tensor, Routing]:
            x_TD, normed_TD = self._attend(x_TD, placement)
            return x_TD, normed_TD, moe.route(normed_TD, placement)

        x_TD, normed_TD, routing = recomputed(until_routed, x_TD)
        shared = moe.shared
        again = None if shared is None else lambda x_TD: recomputed(shared, x_TD)
        out_TD = x_TD + moe.mix(normed_TD, routing, again)
        return out_TD, routing.terms_3, self._loads(routing)

    def _attend(self, x_TD: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)), and what the MLP or the experts read of it."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), placement)
        return x_TD, self.mlp_norm(x_TD)

    def _loads(self, routing: Routing) -> Tensor | None:
        return count_choices(routing.idx_TK, self.moe.config.num_experts) if self.training else None

    def _add_to(self, x_TD: Tensor, placement: Placement) -> None:
        self.attention(self.attention_norm(x_TD), placement, x_TD)
        normed_TD = self.mlp_norm(x_TD)
        if self.is_moe:
            self.moe(normed_TD, placement, x_TD)
        else:
            self.mlp(normed_TD, x_TD)


class Transformer(nn.Module):
    """DeepSeek-Coder (v1) or DeepSeek-Coder-V2, as `config` says.

    Off the meta device the weights start as `init_weights(self, seed=0)`. With `expert_parallel` every layer
    holds this rank's experts alone, and every rank of that group must run every forward, if with no tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        expert_parallel: ops.ExpertParallel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        place_on = None if device is None else torch.device(device)
        # From a tensor: nn.Embedding's own initialisation imports the compiler when on the meta device.
        self.embed = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.vocab_size, config.width, device=place_on, dtype=dtype), freeze=False
        )
        self.layers = nn.ModuleList(
            Layer(config, layer_idx=layer_idx, expert_parallel=expert_parallel, device=place_on, dtype=dtype)
            for layer_idx in range(config.num_layers)
        )
        self.norm = RMSNorm(config.width, eps=config.norm_eps, device=place_on, dtype=dtype)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False, device=place_on, dtype=dtype)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        if not self.embed.weight.is_meta:
            init_weights(self, seed=0)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        num_new_B: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V]; see `features` for the arguments."""
        features = self.features(tokens_BS, cu_seqlens=cu_seqlens, cache=cache, num_new_B=num_new_B)
        logits_BSV: Tensor = self.head(features.hidden_BSD)
        return logits_BSV

    def features(
        self,
        tokens_BS: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        num_new_B: Tensor | None = None,
        has_balance: bool = False,
    ) -> Features:
        """Everything but the head.

        Args:
            tokens_BS: token ids, int32 or int64.
            cu_seqlens: int32 [documents + 1], ascending from 0 to the B * S tokens of a packed batch, the
                end of every row among them. Attention and positions stay inside a document. The values are
                checked on CPUs alone: a GPU would have to be waited for. None: every row is one document.
            cache: from `allocate_cache`; the tokens are appended to its rows and attend what is there, and
                nothing is differentiated and, whatever the mode, no token dropped.
            num_new_B: with a cache, how many of each row's tokens count; the rest is right padding, whose
                output means nothing. None: all.
            has_balance: in evaluation mode too, where no token is dropped, gradients bring balance terms.
        """
        moe = self.config.moe
        is_trained = self.training and cache is None
        placement = place(
            self.config,
            tokens_BS,
            cu_seqlens=cu_seqlens,
            cache=cache,
            num_new_B=num_new_B,
            drops_tokens=is_trained and moe is not None and moe.capacity_factor is not None,
            has_balance=has_balance,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden_TD, layer_terms, layer_loads = self.run_layers(tokens_BS, placement)
        hidden_BSD = hidden_TD.view(*tokens_BS.shape, self.config.width)
        if cache is not None and placement.append is not None:
            cache.commit(placement.append)
        loads_LE = torch.stack(layer_loads) if layer_loads else None
        if moe is None or not layer_terms:
            zero = torch.zeros((), device=hidden_BSD.device)
            return Features(hidden_BSD=hidden_BSD, balance=zero, balance_terms_3=None, loads_LE=loads_LE)
        by_layer = torch.stack(layer_terms)
        total_3 = by_layer.sum(dim=0)
        weights = moe.balance
        return Features(
            hidden_BSD=hidden_BSD,
            balance=total_3[0] * weights.expert
            + total_3[1] * weights.device
            + total_3[2] * weights.communication,
            balance_terms_3=by_layer.detach().mean(dim=0),
            loads_LE=loads_LE,
        )

    def run_layers(
        self, tokens_BS: Tensor, placement: Placement
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """hidden_TD after the last norm, and the balance terms and loads of each layer that has some."""
        x_TD = self.embed(tokens_BS).flatten(0, 1)
        layer_terms: list[Tensor] = []
        layer_loads: list[Tensor] = []
        for layer in self.layers:
            x_TD, terms_3, loads_E = layer(x_TD, placement)
            if terms_3 is not None:
                layer_terms.append(terms_3)
            if loads_E is not None:
                layer_loads.append(loads_E)
        return self.norm(x_TD), layer_terms, layer_loads
