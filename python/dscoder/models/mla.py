"""Multi-head latent attention (DeepSeek-V2 section 2.1, eqs 9-19 and appendix C), in both its forms.

Training form: keys and values are expanded from the latent and attended as ordinary heads. Absorbed form:
W_UK moves into the query and W_UV into the output, so that all heads attend the cached latents themselves,
C + r numbers a token. Prefilling an empty cache uses the first, decoding the second; they agree.
"""

import torch
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import MlaConfig, ModelConfig
from dscoder.models.cache import LatentAppend, LatentCache
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
        if isinstance(cache, LatentCache) and append is not None and not append.is_first:
            out_THv = self._attend_cached(query_THd, latent_Td, placement)
        else:
            out_THv = self._attend_expanded(query_THd, latent_Td, placement)
        return multiply(self.out, out_THv.flatten(1), onto_TD)

    def _attend_expanded(self, query_THd: Tensor, latent_Td: Tensor, placement: Placement) -> Tensor:
        shape, cache, append = self.shape, placement.cache, placement.append
        query_THd, row_Td = ops.latent_rope(
            query_THd,
            latent_Td,
            self.latent_norm.weight,
            placement.cos_Lf,
            placement.sin_Lf,
            placement.angles_T,
            eps=LATENT_NORM_EPS,
        )
        if isinstance(cache, LatentCache) and append is not None:
            cache.write(self.layer_idx, row_Td, append)
        latent_TC, key_Tr = torch.split(row_Td, [shape.kv_lora_rank, shape.rope_dim], dim=-1)
        expanded = self.latent_up(latent_TC).view(
            len(row_Td), shape.num_heads, shape.nope_dim + shape.value_dim
        )
        key_THn, value_THv = expanded.split([shape.nope_dim, shape.value_dim], dim=-1)
        ends = placement.cu_seqlens
        assert ends is not None
        out_THv, _ = ops.mla_prefill(
            query_THd,
            torch.cat([key_THn, key_Tr[:, None].expand(-1, shape.num_heads, -1)], dim=-1),
            value_THv,
            ends,
            ends,
            causal=True,
            scale=self.scale,
        )
        return out_THv

    def _attend_cached(self, query_THd: Tensor, latent_Td: Tensor, placement: Placement) -> Tensor:
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
