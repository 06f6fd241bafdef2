"""ModelConfig <-> config.json of the published checkpoints.

model_type "llama" is DeepSeek-Coder (v1), "deepseek_v2" DeepSeek-Coder-V2. Where readers disagree the
published DeepSeek-V2 code rules (facts in docs/checkpoint.md):

- topk_method "greedy" ignores n_group and topk_group;
- norm_topk_prob divides the K weights by their sum *instead of* multiplying them by routed_scaling_factor,
  and has no effect on a single expert;
- aux_loss_alpha is the expert-level balance loss, taken per sequence (seq_aux).

What config.json has no field for goes under "dscoder", which other readers skip.
"""

from collections.abc import Mapping
from typing import Any

import torch

from dscoder.checkpoint.fields import Fields
from dscoder.checkpoint.rope_hf import rope_from_hf, rope_to_hf
from dscoder.config import BalanceConfig, GqaConfig, MlaConfig, ModelConfig, MoeConfig

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_CLASSES = {"llama": "Llama", "deepseek_v2": "DeepseekV2"}


def _architecture(model_type: str, *, is_scalar: bool) -> str:
    return _CLASSES[model_type] + ("ForSequenceClassification" if is_scalar else "ForCausalLM")


def config_from_hf(data: Mapping[str, Any], *, is_scalar: bool = False) -> ModelConfig:
    """The model that a config.json describes; ValueError names a field that it cannot honour.

    Args:
        is_scalar: it describes a model with a scalar head, not one with a vocabulary.
    """
    fields = Fields(data)
    model_type = fields.choice("model_type", tuple(_CLASSES))
    fields.expect("architectures", [_architecture(model_type, is_scalar=is_scalar)], [])
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0)
    is_latent = model_type == "deepseek_v2"
    num_layers = fields.integer("num_hidden_layers")
    config = ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        num_layers=num_layers,
        mlp_width=fields.integer("intermediate_size"),
        attention=_mla_from_hf(fields) if is_latent else _gqa_from_hf(fields),
        moe=_moe_from_hf(fields, num_layers) if is_latent else None,
        rope=rope_from_hf(fields, is_latent=is_latent),
        max_positions=fields.integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        init_std=fields.number("initializer_range", 0.02),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_id=_token_id(fields, "bos_token_id"),
        eos_id=_token_id(fields, "eos_token_id"),
    )
    fields.finish()
    return config


def is_scalar_hf(data: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the model has a scalar head."""
    named = data.get("architectures")
    return named in [[_architecture(model_type, is_scalar=True)] for model_type in _CLASSES]


def dtype_from_hf(data: Mapping[str, Any]) -> torch.dtype | None:
    """The type that a config.json says its weights have (torch_dtype or, since transformers 5, dtype)."""
    fields = Fields(data)
    key = "dtype" if fields.value("torch_dtype") is None else "torch_dtype"
    name = fields.value(key)
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise fields.refuse(key, wanted=f"one of {', '.join(_DTYPES)}", got=name)
    return _DTYPES[name]


def _token_id(fields: Fields, key: str) -> int:
    value = fields.value(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool):
        raise fields.refuse(key, wanted="one token id", got=value)
    return value


def _gqa_from_hf(fields: Fields) -> GqaConfig:
    num_heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    head_dim = fields.value("head_dim")
    if head_dim is None and width % num_heads:
        raise fields.refuse("hidden_size", wanted=f"a multiple of {num_heads} heads", got=width)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        wanted = f"a divisor of num_attention_heads ({num_heads})"
        raise fields.refuse("num_key_value_heads", wanted=wanted, got=num_kv_heads)
    head_dim = fields.integer("head_dim", width // num_heads)
    return GqaConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


def _mla_from_hf(fields: Fields) -> MlaConfig:
    q_lora_rank = None if fields.value("q_lora_rank") is None else fields.integer("q_lora_rank")
    config = MlaConfig(
        num_heads=fields.integer("num_attention_heads"),
        q_lora_rank=q_lora_rank,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
    )
    # Latent attention has a key head per query head; transformers adds the two widths below.
    fields.expect("num_key_value_heads", config.num_heads)
    fields.expect("head_dim", config.rope_dim)
    fields.expect("qk_head_dim", config.qk_dim)
    return config


def _moe_from_hf(fields: Fields, num_layers: int) -> MoeConfig | None:
    fields.expect("moe_layer_freq", 1)
    fields.expect("scoring_func", "softmax")
    num_experts, num_topk = fields.value("n_routed_experts"), fields.value("num_experts_per_tok")
    num_dense_layers = fields.integer("first_k_dense_replace", 0)
    num_groups, num_groups_kept = _groups_from_hf(fields)
    is_normalised = fields.flag("norm_topk_prob", False)
    scale = fields.number("routed_scaling_factor", 1.0)
    num_shared_experts = fields.integer("n_shared_experts", 0)
    expert_width = fields.value("moe_intermediate_size")
    balance, dropping = _training_from_hf(fields)
    if num_experts is None or (num_topk is None and num_dense_layers >= num_layers):
        return None
    num_experts, num_topk = fields.integer("n_routed_experts"), fields.integer("num_experts_per_tok")
    expert_width = fields.integer("moe_intermediate_size")
    if num_groups < 1 or num_experts % num_groups:
        raise fields.refuse(
            "n_group", wanted=f"a divisor of n_routed_experts ({num_experts})", got=num_groups
        )
    if not 1 <= num_groups_kept <= num_groups:
        raise fields.refuse("topk_group", wanted=f"in [1, n_group = {num_groups}]", got=num_groups_kept)
    renormalize = is_normalised and num_topk > 1
    return MoeConfig(
        num_experts=num_experts,
        num_shared_experts=num_shared_experts,
        num_topk=num_topk,
        expert_width=expert_width,
        num_groups=num_groups,
        num_groups_kept=num_groups_kept,
        scale=1.0 if renormalize else scale,
        renormalize=renormalize,
        num_dense_layers=num_dense_layers,
        balance=balance,
        **dropping,
    )


def _groups_from_hf(fields: Fields) -> tuple[int, int]:
    """num_groups and num_groups_kept."""
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    if method == "greedy":
        # Read, because the published files have them, and without effect.
        fields.value("n_group"), fields.value("topk_group")
        return 1, 1
    return fields.integer("n_group"), fields.integer("topk_group")


def _training_from_hf(fields: Fields) -> tuple[BalanceConfig, dict[str, Any]]:
    """Balance weights and token dropping."""
    alpha = fields.number("aux_loss_alpha", 0.0)
    if not fields.flag("seq_aux", True) and alpha > 0:
        wanted = "true while aux_loss_alpha > 0 (the balance loss is taken per sequence)"
        raise fields.refuse("seq_aux", wanted=wanted, got=False)
    extra = fields.part("dscoder")
    if extra is None:
        return BalanceConfig(expert=alpha), {}
    balance = BalanceConfig(
        expert=alpha,
        device=extra.number("device_balance", 0.0),
        communication=extra.number("communication_balance", 0.0),
    )
    dropping: dict[str, Any] = {"never_dropped_share": extra.number("never_dropped_share", 0.1)}
    if extra.value("capacity_factor") is not None:
        dropping["capacity_factor"] = extra.number("capacity_factor")
    extra.finish()
    return balance, dropping


def config_to_hf(
    config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16, is_scalar: bool = False
) -> dict[str, Any]:
    """The published config.json of `config`; ValueError where that form cannot hold it.

    Args:
        is_scalar: of a model with a scalar head. transformers reads the score at the last token that is not
            `pad_token_id`: there it is the begin-of-text token, with which no sequence ends.
    """
    names = {torch_dtype: name for name, torch_dtype in _DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"config_to_hf: dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    is_latent = isinstance(config.attention, MlaConfig)
    model_type = "deepseek_v2" if is_latent else "llama"
    data = {
        "architectures": [_architecture(model_type, is_scalar=is_scalar)],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": config.init_std,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "model_type": model_type,
        "num_attention_heads": config.attention.num_heads,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": names[dtype],
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **rope_to_hf(config.rope),
    }
    if is_scalar:
        data |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": config.bos_id}
    if isinstance(config.attention, MlaConfig):
        return data | _mla_to_hf(config.attention) | _moe_to_hf(config.moe, config.num_layers)
    if config.moe is not None:
        raise ValueError("config_to_hf: moe must be None with GqaConfig (no published layout), got MoeConfig")
    return data | {
        "head_dim": config.attention.head_dim,
        "mlp_bias": False,
        "num_key_value_heads": config.attention.num_kv_heads,
    }


def _mla_to_hf(config: MlaConfig) -> dict[str, Any]:
    return {
        "kv_lora_rank": config.kv_lora_rank,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.nope_dim,
        "qk_rope_head_dim": config.rope_dim,
        "v_head_dim": config.value_dim,
    }


def _moe_to_hf(config: MoeConfig | None, num_layers: int) -> dict[str, Any]:
    if config is None:
        # transformers has a default number of experts and makes every layer dense by this field alone.
        return {"first_k_dense_replace": num_layers, "moe_layer_freq": 1}
    if config.renormalize and (config.num_topk == 1 or config.scale != 1.0):
        raise ValueError(
            "config_to_hf: renormalize must be False or stand with num_topk > 1 and scale 1 (norm_topk_prob "
            f"replaces routed_scaling_factor), got num_topk {config.num_topk} and scale {config.scale}"
        )
    return {
        "aux_loss_alpha": config.balance.expert,
        "dscoder": {
            "capacity_factor": config.capacity_factor,
            "communication_balance": config.balance.communication,
            "device_balance": config.balance.device,
            "never_dropped_share": config.never_dropped_share,
        },
        "first_k_dense_replace": config.num_dense_layers,
        "moe_intermediate_size": config.expert_width,
        "moe_layer_freq": 1,
        "n_group": config.num_groups,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "norm_topk_prob": config.renormalize,
        "num_experts_per_tok": config.num_topk,
        "routed_scaling_factor": config.scale,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": config.num_groups_kept,
        "topk_method": "greedy" if config.num_groups == 1 else "group_limited_greedy",
    }
