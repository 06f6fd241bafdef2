"""What a model is: the shapes and constants of DeepSeek-Coder (v1) and DeepSeek-Coder-V2.

v1 is a dense Transformer with grouped-query attention and linear rope scaling (DeepSeek-Coder, arXiv
2401.14196, Table 2). V2 has latent attention, routed and shared experts and YaRN (DeepSeek-V2, arXiv
2405.04434, sections 2 and 3.1.2). Both are one `ModelConfig`: the parts say which.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


def _require_positive(record: str, values: Mapping[str, float]) -> None:
    for field, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{record}: {field} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """Context extension by frequency interpolation (YaRN; DeepSeek-V2 section 3.1.4).

    cos and sin are multiplied by m(mscale) / m(mscale_all_dim), with m(x) = 0.1 * x * ln(factor) + 1, so
    m(0) = 1. Latent attention multiplies the softmax scale by m(mscale_all_dim)^2 too; grouped-query
    attention does not (nor does transformers' LLaMA).
    """

    factor: float = 40.0  # target context / trained context
    original_max_positions: int = 4096
    beta_fast: float = 32.0  # rotations above which a frequency is left alone
    beta_slow: float = 1.0  # rotations below which a frequency is interpolated in full
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ValueError(f"YarnConfig: factor must be >= 1, got {self.factor}")
        _require_positive("YarnConfig", {"original_max_positions": self.original_max_positions})
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"YarnConfig: beta_fast must be > beta_slow > 0, got {self.beta_fast} and {self.beta_slow}"
            )
        if self.mscale < 0 or self.mscale_all_dim < 0:
            raise ValueError(
                f"YarnConfig: mscale and mscale_all_dim must be >= 0, "
                f"got {self.mscale} and {self.mscale_all_dim}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions: base frequency and at most one way to stretch them."""

    theta: float = 10000.0
    linear_factor: float = 1.0  # positions are divided by it (v1's long context)
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        _require_positive("RopeConfig", {"theta": self.theta})
        if not self.linear_factor >= 1.0:
            raise ValueError(f"RopeConfig: linear_factor must be >= 1, got {self.linear_factor}")
        if self.yarn is not None and self.linear_factor != 1.0:
            raise ValueError(f"RopeConfig: linear_factor must be 1 with yarn, got {self.linear_factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GqaConfig:
    """Grouped-query attention (v1): every num_heads / num_kv_heads query heads share one key head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require_positive(
            "GqaConfig",
            {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim},
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"GqaConfig: num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"GqaConfig: head_dim must be even, got {self.head_dim}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2 eqs 9-19): keys and values from one cached latent."""

    num_heads: int
    q_lora_rank: int | None  # None: the query is a plain projection (V2-Lite)
    kv_lora_rank: int  # C, the latent width
    nope_dim: int  # n, per head, without position
    rope_dim: int  # r, per head, rotated; the key's is shared by all heads
    value_dim: int  # v, per head

    def __post_init__(self) -> None:
        sizes = {
            "num_heads": self.num_heads,
            "kv_lora_rank": self.kv_lora_rank,
            "nope_dim": self.nope_dim,
            "rope_dim": self.rope_dim,
            "value_dim": self.value_dim,
        }
        if self.q_lora_rank is not None:
            sizes["q_lora_rank"] = self.q_lora_rank
        _require_positive("MlaConfig", sizes)
        if self.rope_dim % 2:
            raise ValueError(f"MlaConfig: rope_dim must be even, got {self.rope_dim}")

    @property
    def qk_dim(self) -> int:
        """Width of one query or key head: nope_dim + rope_dim."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Elements cached per token and layer: kv_lora_rank + rope_dim."""
        return self.kv_lora_rank + self.rope_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """Weights of the three balance losses (DeepSeek-V2 eqs 23-31); 0 switches a term off."""

    expert: float = 0.0  # alpha_1
    device: float = 0.0  # alpha_2
    communication: float = 0.0  # alpha_3

    def __post_init__(self) -> None:
        weights = {"expert": self.expert, "device": self.device, "communication": self.communication}
        for field, value in weights.items():
            if not value >= 0:
                raise ValueError(f"BalanceConfig: {field} must be >= 0, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """Routed and shared experts (DeepSeekMoE; DeepSeek-V2 eqs 20-22 and section 2.2).

    A group is the set of experts that live on one device: device-limited routing keeps the
    `num_groups_kept` groups whose best expert scores highest.
    """

    num_experts: int  # E, routed
    num_shared_experts: int
    num_topk: int  # K
    expert_width: int  # F, of one expert
    num_groups: int = 1  # G
    num_groups_kept: int = 1
    scale: float = 1.0  # multiplies every gate weight
    renormalize: bool = False  # divide the K weights by their sum
    num_dense_layers: int = 1  # the first layers keep a dense MLP
    balance: BalanceConfig = BalanceConfig()
    capacity_factor: float | None = None  # device-level token dropping in training; None: no dropping
    never_dropped_share: float = 0.1  # of the sequences, whose tokens are never dropped

    def __post_init__(self) -> None:
        _require_positive(
            "MoeConfig",
            {
                "num_experts": self.num_experts,
                "num_topk": self.num_topk,
                "expert_width": self.expert_width,
                "num_groups": self.num_groups,
                "num_groups_kept": self.num_groups_kept,
                "scale": self.scale,
            },
        )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"MoeConfig: num_experts must be a multiple of num_groups, "
                f"got {self.num_experts} and {self.num_groups}"
            )
        if self.num_groups_kept > self.num_groups:
            raise ValueError(
                f"MoeConfig: num_groups_kept must be <= num_groups, "
                f"got {self.num_groups_kept} and {self.num_groups}"
            )
        num_reachable = self.num_experts // self.num_groups * self.num_groups_kept
        if self.num_topk > num_reachable:
            raise ValueError(
                f"MoeConfig: num_topk must be <= {num_reachable} (experts in the kept groups), "
                f"got {self.num_topk}"
            )
        if self.num_shared_experts < 0 or self.num_dense_layers < 0:
            raise ValueError(
                f"MoeConfig: num_shared_experts and num_dense_layers must be >= 0, "
                f"got {self.num_shared_experts} and {self.num_dense_layers}"
            )
        if self.capacity_factor is not None:
            _require_positive("MoeConfig", {"capacity_factor": self.capacity_factor})
        if not 0.0 <= self.never_dropped_share <= 1.0:
            raise ValueError(
                f"MoeConfig: never_dropped_share must be in [0, 1], got {self.never_dropped_share}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A whole model. `attention` decides the family, `moe` whether it has experts."""

    vocab_size: int  # V, rows of the embedding, padding rows included
    width: int  # D
    num_layers: int
    mlp_width: int  # of the dense layers
    attention: GqaConfig | MlaConfig
    moe: MoeConfig | None = None
    rope: RopeConfig = RopeConfig()
    max_positions: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.006  # DeepSeek LLM section 2.3, DeepSeek-V2 section 3.1.2
    tie_embeddings: bool = False
    bos_id: int = 0
    eos_id: int = 1

    def __post_init__(self) -> None:
        _require_positive(
            "ModelConfig",
            {
                "vocab_size": self.vocab_size,
                "width": self.width,
                "num_layers": self.num_layers,
                "mlp_width": self.mlp_width,
                "max_positions": self.max_positions,
                "norm_eps": self.norm_eps,
                "init_std": self.init_std,
            },
        )
        for field, token_id in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"ModelConfig: {field} must be in [0, {self.vocab_size}), got {token_id}")

    @property
    def rotated_dim(self) -> int:
        """Width of what the rotary positions turn, of every head."""
        attention = self.attention
        return attention.rope_dim if isinstance(attention, MlaConfig) else attention.head_dim

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) has experts instead of a dense MLP."""
        return self.moe is not None and layer_idx >= self.moe.num_dense_layers
