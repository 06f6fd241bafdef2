"""Grouped-query attention of DeepSeek-Coder (v1): LLaMA's, with half-split rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dscoder import ops
from dscoder.config import GqaConfig, ModelConfig
from dscoder.models.cache import KeyValueAppend, KeyValueCache
from dscoder.models.cached_rows import PackedRows
from dscoder.models.placement import Placement
from dscoder.models.residual import multiply


class GqaAttention(nn.Module):
    """num_heads query heads on num_kv_heads key and value heads; no biases."""

    def __init__(
        self,
        config: ModelConfig,
        attention: GqaConfig,
        *,
        layer_idx: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = attention.num_heads
        self.num_kv_heads = attention.num_kv_heads
        self.head_dim = attention.head_dim
        width = config.width
        kv_width = attention.num_kv_heads * attention.head_dim
        q_width = attention.num_heads * attention.head_dim
        self.query = nn.Linear(width, q_width, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(width, kv_width, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(width, kv_width, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(q_width, width, bias=False, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, placement: Placement, onto_TD: Tensor | None = None) -> Tensor:
        """x_TD -> [T, D], added to `onto_TD` in place where there is one.

        With a cache its keys and values are stored, and the stored ones are attended.
        """
        num_tokens = len(x_TD)
        query_THd = self.query(x_TD).view(num_tokens, self.num_heads, self.head_dim)
        key_TGd = self.key(x_TD).view(num_tokens, self.num_kv_heads, self.head_dim)
        value_TGd = self.value(x_TD).view(num_tokens, self.num_kv_heads, self.head_dim)
        query_THd, key_TGd = ops.rope(
            query_THd, key_TGd, placement.cos_Lf, placement.sin_Lf, placement.angles_T, interleaved=False
        )
        cache, append = placement.cache, placement.append
        if isinstance(cache, KeyValueCache) and append is not None:
            cache.write(self.layer_idx, key_TGd, value_TGd, append)
        if append is not None and not append.is_first:
            out_THd = self._attend_cached(query_THd, placement)
        elif placement.is_packed:
            out_THd = self._attend_packed(query_THd, key_TGd, value_TGd, placement)
        else:
            out_THd = self._attend_rows(query_THd, key_TGd, value_TGd, placement)
        return multiply(self.out, out_THd.flatten(1), onto_TD)

    def _attend_rows(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, placement: Placement
    ) -> Tensor:
        # Every row is one document, so one causal call serves; right padding is never seen from the left.
        query, key, value = (
            x.view(placement.num_sequences, placement.length, *x.shape[1:]).transpose(1, 2)
            for x in (query_THd, key_TGd, value_TGd)
        )
        out_BHSd = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.num_heads != self.num_kv_heads
        )
        return out_BHSd.transpose(1, 2).flatten(0, 1)

    def _attend_packed(
        self, query_THd: Tensor, key_TGd: Tensor, value_TGd: Tensor, placement: Placement
    ) -> Tensor:
        # One op for any documents: a mask would cost the square of the window, a call per document waits for
        # the device and compiles anew for every number of them (docs/models.md).
        ends = placement.cu_seqlens
        assert ends is not None
        out_THd, _ = ops.mla_prefill(
            query_THd, key_TGd, value_TGd, ends, ends, causal=True, scale=self.head_dim**-0.5
        )
        return out_THd

    def _attend_cached(self, query_THd: Tensor, placement: Placement) -> Tensor:
        cache, append = placement.cache, placement.append
        assert isinstance(cache, KeyValueCache)
        assert isinstance(append, KeyValueAppend)
        key_BLGd, value_BLGd = (x.to(query_THd.dtype) for x in cache.read(self.layer_idx, append))
        if isinstance(append.seen, PackedRows):
            entries = key_BLGd.flatten(0, 1), value_BLGd.flatten(0, 1)
            ends = append.seen.ends_q, append.seen.ends_k
            return ops.mla_prefill(query_THd, *entries, *ends, causal=True, scale=self.head_dim**-0.5)[0]
        assert append.seen is not None
        num_rows, length = placement.num_sequences, placement.length
        num_sharing = self.num_heads // self.num_kv_heads
        # The heads that share a key stand as extra positions: keys and values are not repeated.
        query = query_THd.view(num_rows, length, self.num_kv_heads, num_sharing, self.head_dim)
        query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            query,
            key_BLGd.transpose(1, 2),
            value_BLGd.transpose(1, 2),
            attn_mask=append.seen.to(query.dtype),
        )
        out = out.view(num_rows, self.num_kv_heads, num_sharing, length, self.head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(query_THd.shape)
