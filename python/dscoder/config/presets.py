"""The published models by name, and two tiny ones for tests, demos and laptops.

Numbers: DeepSeek-Coder Table 2 and the published config.json files (v1); DeepSeek-V2 sections 3.1.2 and
appendix B and the published config.json files (V2). Balance weights are the papers' (V2-Lite: 0.001,
expert level only; V2: 0.003 / 0.05 / 0.02), not the config.json's, which the published models never
trained with.
"""

from dataclasses import replace

from dscoder.config.model import (
    BalanceConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    YarnConfig,
)

_CODER_1_3B = ModelConfig(
    vocab_size=32256,
    width=2048,
    num_layers=24,
    mlp_width=5504,
    attention=GqaConfig(num_heads=16, num_kv_heads=16, head_dim=128),
    rope=RopeConfig(theta=100000.0, linear_factor=4.0),
    max_positions=16384,
    bos_id=32013,
    eos_id=32014,
)

_V2_LITE = ModelConfig(
    vocab_size=102400,
    width=2048,
    num_layers=27,
    mlp_width=10944,
    attention=MlaConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
    moe=MoeConfig(
        num_experts=64,
        num_shared_experts=2,
        num_topk=6,
        expert_width=1408,
        balance=BalanceConfig(expert=0.001),
    ),
    rope=RopeConfig(theta=10000.0, yarn=YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)),
    max_positions=163840,
    bos_id=100000,
    eos_id=100001,
)

_TINY_ROPE = RopeConfig(theta=10000.0)

PRESETS: dict[str, ModelConfig] = {
    "coder_1_3b": _CODER_1_3B,
    "coder_6_7b": replace(
        _CODER_1_3B,
        width=4096,
        num_layers=32,
        mlp_width=11008,
        attention=GqaConfig(num_heads=32, num_kv_heads=32, head_dim=128),
    ),
    "coder_33b": replace(
        _CODER_1_3B,
        width=7168,
        num_layers=62,
        mlp_width=19200,
        attention=GqaConfig(num_heads=56, num_kv_heads=8, head_dim=128),
    ),
    "coder_v15_7b": ModelConfig(
        vocab_size=102400,
        width=4096,
        num_layers=30,
        mlp_width=11008,
        attention=GqaConfig(num_heads=32, num_kv_heads=32, head_dim=128),
        rope=RopeConfig(theta=10000.0),
        max_positions=4096,
        bos_id=100000,
        eos_id=100001,
    ),
    "v2_lite": _V2_LITE,
    "v2": replace(
        _V2_LITE,
        width=5120,
        num_layers=60,
        mlp_width=12288,
        attention=MlaConfig(
            num_heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
        ),
        moe=MoeConfig(
            num_experts=160,
            num_shared_experts=2,
            num_topk=6,
            expert_width=1536,
            num_groups=8,
            num_groups_kept=3,
            scale=16.0,
            balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02),
            capacity_factor=1.0,
        ),
        rope=RopeConfig(theta=10000.0, yarn=YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "tiny_dense": ModelConfig(
        vocab_size=4096,
        width=256,
        num_layers=4,
        mlp_width=688,
        attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=64),
        rope=_TINY_ROPE,
        max_positions=1024,
    ),
    "tiny_moe": ModelConfig(
        vocab_size=4096,
        width=256,
        num_layers=4,
        mlp_width=688,
        attention=MlaConfig(
            num_heads=4, q_lora_rank=None, kv_lora_rank=64, nope_dim=32, rope_dim=16, value_dim=32
        ),
        moe=MoeConfig(
            num_experts=16,
            num_shared_experts=2,
            num_topk=4,
            expert_width=96,
            balance=BalanceConfig(expert=0.001),
        ),
        rope=_TINY_ROPE,
        max_positions=1024,
    ),
}


def preset(name: str) -> ModelConfig:
    """The model config called `name`; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(sorted(PRESETS))}, got {name!r}")
    return PRESETS[name]
