"""Multi-head latent attention (DeepSeek-V2 section 2.1, eqs 9-19 and appendix C), in both its forms.

Expanded form: keys and values are made from the latent and attended as ordinary heads. Absorbed form: W_UK
moves into the query and W_UV into the output, so that all heads attend the cached latents themselves, C + r
numbers a token. Training and prompts use the first, decoding the second, and a later chunk of a prompt the
one with fewer products (expansion.py); they agree.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import MlaConfig, ModelConfig
from dscoder.models.cache import LatentAppend, LatentCache
from dscoder.models.expansion import Expansion, merge
from dscoder.models.norm import RMSNorm
from dscoder.models.placement import Placement
from dscoder.models.residual import multiply
from dscoder.models.yarn import softmax_scale

# The published code never passes its rms_norm_eps to the two latent norms: they keep their default.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Keys and values from one latent of width C and one rotated key head shared by all heads."""

    def __init__(
        self,
        config: ModelConfig,
        attention: MlaConfig,
        *,
        layer_idx: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.shape = attention
        self.scale = softmax_scale(config.rope, attention.qk_dim)
        width, num_heads, rank = config.width, attention.num_heads, attention.kv_lora_rank

        def linear(num_in: int, num_out: int) -> nn.Linear:
            return nn.Linear(num_in, num_out, bias=False, device=device, dtype=dtype)

        def norm(num_features: int) -> RMSNorm:
            return RMSNorm(num_features, eps=LATENT_NORM_EPS, device=device, dtype=dtype)

        self.has_query_latent = attention.q_lora_rank is not None
        if attention.q_lora_rank is None:
            self.query = linear(width, num_heads * attention.qk_dim)
        else:
            self.query_down = linear(width, attention.q_lora_rank)
            self.query_norm = norm(attention.q_lora_rank)
            self.query_up = linear(attention.q_lora_rank, num_heads * attention.qk_dim)
        self.latent_down = linear(width, attention.cache_dim)
        self.latent_norm = norm(rank)
        self.latent_up = linear(rank, num_heads * (attention.nope_dim + attention.value_dim))
        self.out = linear(num_heads * attention.value_dim, width)

    def forward(self, x_TD: Tensor, placement: Placement, onto_TD: Tensor | None = None) -> Tensor:
        """x_TD -> [T, D], added to `onto_TD` in place where there is one.

        With a cache its latents are stored, and the stored ones are attended.
        """
        query = (
            self.query_up(self.query_norm(self.query_down(x_TD)))
            if self.has_query_latent
            else self.query(x_TD)
        )
        query_THd = query.view(len(x_TD), self.shape.num_heads, self.shape.qk_dim)
        latent_Td = self.latent_down(x_TD)
        cache, append = placement.cache, placement.append
        is_absorbed = (
            isinstance(cache, LatentCache)
            and isinstance(append, LatentAppend)
            and not append.is_first
            and append.expansion is None
        )
        attend = self._attend_absorbed if is_absorbed else self._attend_expanded
        return multiply(self.out, attend(query_THd, latent_Td, placement).flatten(1), onto_TD)

    def _attend_expanded(self, query_THd: Tensor, latent_Td: Tensor, placement: Placement) -> Tensor:
        cache, append = placement.cache, placement.append
        query_THd, row_Td = ops.latent_rope(
            query_THd,
            latent_Td,
            self.latent_norm.weight,
            placement.cos_Lf,
            placement.sin_Lf,
            placement.angles_T,
            eps=LATENT_NORM_EPS,
        )
        if isinstance(cache, LatentCache) and isinstance(append, LatentAppend):
            cache.write(self.layer_idx, row_Td, append)
            if append.expansion is not None:
                return self._attend_blocks(query_THd, cache, append.expansion)
        ends = placement.cu_seqlens
        assert ends is not None
        return self._attend_rows(query_THd, row_Td, ends, ends, is_causal=True)[0]

    def _attend_blocks(self, query_THd: Tensor, cache: LatentCache, expansion: Expansion) -> Tensor:
        """Blocks of cached rows one by one, so that only one of them is ever expanded."""
        parts = (
            self._attend_rows(
                query_THd,
                cache.read(self.layer_idx, block.slots_M),
                expansion.ends_q,
                block.ends_k,
                is_causal=block.is_causal,
            )
            for block in expansion.blocks
        )
        out_THv, _ = reduce(merge, parts)
        return out_THv.to(query_THd.dtype)

    def _attend_rows(
        self, query_THd: Tensor, row_Md: Tensor, ends_q: Tensor, ends_k: Tensor, *, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Out and log-sum-exp over rows of latent and rotated key, expanded to heads."""
        shape = self.shape
        latent_MC, key_Mr = torch.split(row_Md, [shape.kv_lora_rank, shape.rope_dim], dim=-1)
        expanded = self.latent_up(latent_MC).view(
            len(row_Md), shape.num_heads, shape.nope_dim + shape.value_dim
        )
        key_MHn, value_MHv = expanded.split([shape.nope_dim, shape.value_dim], dim=-1)
        return ops.mla_prefill(
            query_THd,
            torch.cat([key_MHn, key_Mr[:, None].expand(-1, shape.num_heads, -1)], dim=-1),
            value_MHv,
            ends_q,
            ends_k,
            causal=is_causal,
            scale=self.scale,
        )

    def _attend_absorbed(self, query_THd: Tensor, latent_Td: Tensor, placement: Placement) -> Tensor:
        """Every product writes where the next step reads: no copies between the kernels."""
        shape, cache, append = self.shape, placement.cache, placement.append
        assert isinstance(cache, LatentCache)
        assert isinstance(append, LatentAppend)
        num_tokens, num_heads, rank = len(query_THd), shape.num_heads, shape.kv_lora_rank
        up = self.latent_up.weight.to(query_THd.dtype).view(num_heads, -1, rank)
        key_up_HnC, value_up_HvC = up[:, : shape.nope_dim], up[:, shape.nope_dim :]
        absorbed_THd = query_THd.new_empty(num_tokens, num_heads, shape.cache_dim)
        nope_HTn = query_THd[..., : shape.nope_dim].transpose(0, 1)
        torch.bmm(nope_HTn, key_up_HnC, out=absorbed_THd[..., :rank].transpose(0, 1))
        pages = cache.pages[self.layer_idx]
        ops.latent_append(
            query_THd,
            latent_Td,
            self.latent_norm.weight,
            placement.cos_Lf,
            placement.sin_Lf,
            placement.angles_T,
            eps=LATENT_NORM_EPS,
            target=ops.AppendTarget(slots_T=append.slots_T, cache_PLd=pages, query_out_THd=absorbed_THd),
        )
        # Columns, padding included, count as present: a token is causally left of its row's padding.
        out_BSHC, _ = ops.mla_decode(
            absorbed_THd.view(placement.num_sequences, placement.length, num_heads, shape.cache_dim),
            pages,
            append.page_table_BN,
            append.end_lens_B,
            value_dim=rank,
            scale=self.scale,
            plan=append.plan,
        )
        out_HTC = out_BSHC.view(num_tokens, num_heads, rank).transpose(0, 1)
        out_THv = query_THd.new_empty(num_tokens, num_heads, shape.value_dim)
        torch.bmm(out_HTC, value_up_HvC.transpose(1, 2), out=out_THv.transpose(0, 1))
        return out_THv
