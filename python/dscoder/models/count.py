"""How many parameters a config has, without building it."""

from dataclasses import dataclass

from dscoder.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters of a model.

    `active` are those that multiply one token: without the experts that it does not visit and without the
    embedding table, which is a lookup (a tied table is the head too, and counts). So counted, V2-Lite has
    2.45e9 (published: 2.4B) and V2 20.9e9 (published: 21B).
    """

    total: int
    active: int


def _attention(config: GqaConfig | MlaConfig, width: int) -> int:
    if isinstance(config, GqaConfig):
        return 2 * width * config.head_dim * (config.num_heads + config.num_kv_heads)
    num_query_features = config.num_heads * config.qk_dim
    if config.q_lora_rank is None:
        query = width * num_query_features
    else:
        query = config.q_lora_rank * (width + 1 + num_query_features)  # 1: the norm
    down = width * config.cache_dim + config.kv_lora_rank
    up = config.kv_lora_rank * config.num_heads * (config.nope_dim + config.value_dim)
    return query + down + up + width * config.num_heads * config.value_dim


def _experts(config: MoeConfig, width: int, num_routed: int) -> int:
    num_experts = num_routed + config.num_shared_experts
    return num_experts * 3 * width * config.expert_width + config.num_experts * width


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total and active parameters of `config`; `total` equals the sum of numel() of the built model."""
    table = config.vocab_size * config.width
    block = _attention(config.attention, config.width) + 2 * config.width
    num_moe_layers = sum(config.is_moe_layer(layer_idx) for layer_idx in range(config.num_layers))
    dense = (config.num_layers - num_moe_layers) * 3 * config.width * config.mlp_width
    shared = config.num_layers * block + dense + table + config.width  # with the head and the last norm
    total = shared if config.tie_embeddings else shared + table
    if config.moe is None:
        return ParameterCount(total=total, active=shared)
    return ParameterCount(
        total=total + num_moe_layers * _experts(config.moe, config.width, config.moe.num_experts),
        active=shared + num_moe_layers * _experts(config.moe, config.width, config.moe.num_topk),
    )
