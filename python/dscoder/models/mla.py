"""Multi-head latent attention (DeepSeek-V2 section 2.1, eqs 9-19 and appendix C), in both its forms.

Training form: keys and values are expanded from the latent and attended as ordinary heads. Absorbed form:
W_UK moves into the query and W_UV into the output, so that all heads attend the cached latents themselves,
C + r numbers a token. Prefilling an empty cache uses the first, decoding the second; they agree.
"""

import torch
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import MlaConfig, ModelConfig
from dscoder.models.cache import LatentCache
from dscoder.models.norm import RMSNorm
from dscoder.models.placement import Placement
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

    def forward(self, x_TD: Tensor, placement: Placement) -> Tensor:
        """x_TD -> [T, D]; with a cache its latents are stored, and the stored ones are attended."""
        shape = self.shape
        query = (
            self.query_up(self.query_norm(self.query_down(x_TD)))
            if self.has_query_latent
            else self.query(x_TD)
        )
        nope_THn, rope_THr = query.view(len(x_TD), shape.num_heads, shape.qk_dim).split(
            [shape.nope_dim, shape.rope_dim], dim=-1
        )
        latent_TC, key_Tr = self.latent_down(x_TD).split([shape.kv_lora_rank, shape.rope_dim], dim=-1)
        latent_TC = self.latent_norm(latent_TC)
        rope_THr, key_T1r = ops.rope(
            rope_THr, key_Tr[:, None], placement.cos_Tf, placement.sin_Tf, placement.rows_T, interleaved=True
        )
        cache, append = placement.cache, placement.append
        if isinstance(cache, LatentCache) and append is not None:
            cache.write(self.layer_idx, torch.cat([latent_TC, key_T1r[:, 0]], dim=-1), append)
            if not append.is_first:
                return self._attend_latents(nope_THn, rope_THr, placement)
        return self._attend_expanded(nope_THn, rope_THr, latent_TC, key_T1r, placement)

    def _attend_expanded(
        self, nope_THn: Tensor, rope_THr: Tensor, latent_TC: Tensor, key_T1r: Tensor, placement: Placement
    ) -> Tensor:
        shape = self.shape
        expanded = self.latent_up(latent_TC).view(
            len(latent_TC), shape.num_heads, shape.nope_dim + shape.value_dim
        )
        key_THn, value_THv = expanded.split([shape.nope_dim, shape.value_dim], dim=-1)
        out_THv, _ = ops.mla_prefill(
            torch.cat([nope_THn, rope_THr], dim=-1),
            torch.cat([key_THn, key_T1r.expand(-1, shape.num_heads, -1)], dim=-1),
            value_THv,
            placement.cu_seqlens,
            placement.cu_seqlens,
            causal=True,
            scale=self.scale,
        )
        out_TD: Tensor = self.out(out_THv.flatten(1))
        return out_TD

    def _attend_latents(self, nope_THn: Tensor, rope_THr: Tensor, placement: Placement) -> Tensor:
        shape, cache, append = self.shape, placement.cache, placement.append
        assert isinstance(cache, LatentCache)
        assert append is not None
        assert append.page_table_BN is not None
        up = self.latent_up.weight.view(shape.num_heads, -1, shape.kv_lora_rank)
        key_up_HnC, value_up_HvC = up[:, : shape.nope_dim], up[:, shape.nope_dim :]
        absorbed_THC = torch.bmm(nope_THn.transpose(0, 1), key_up_HnC).transpose(0, 1)
        query_THd = torch.cat([absorbed_THC, rope_THr], dim=-1)
        # Columns, padding included, count as present: a token is causally left of its row's padding.
        out_BSHC, _ = ops.mla_decode(
            query_THd.view(placement.num_sequences, placement.length, shape.num_heads, shape.cache_dim),
            cache.pages[self.layer_idx],
            append.page_table_BN,
            append.end_lens_B,
            value_dim=shape.kv_lora_rank,
            scale=self.scale,
        )
        out_HTC = out_BSHC.flatten(0, 1).transpose(0, 1)
        out_THv = torch.bmm(out_HTC, value_up_HvC.transpose(1, 2)).transpose(0, 1)
        out_TD: Tensor = self.out(out_THv.flatten(1))
        return out_TD
