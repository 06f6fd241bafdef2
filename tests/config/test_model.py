"""Model configs refuse what no model can be."""

import dataclasses

import pytest

from dscoder.config import (
    BalanceConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    YarnConfig,
    preset,
)

GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MLA = {
    "num_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "nope_dim": 8,
    "rope_dim": 4,
    "value_dim": 6,
}
MOE = {"num_experts": 8, "num_shared_experts": 1, "num_topk": 2, "expert_width": 4}
MODEL = {"vocab_size": 16, "width": 8, "num_layers": 2, "mlp_width": 8, "attention": GqaConfig(**GQA)}

REFUSED = [
    (GqaConfig, GQA, {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    (GqaConfig, GQA, {"head_dim": 7}, "head_dim must be even, got 7"),
    (GqaConfig, GQA, {"num_heads": 0}, "num_heads must be positive, got 0"),
    (MlaConfig, MLA, {"rope_dim": 5}, "rope_dim must be even, got 5"),
    (MlaConfig, MLA, {"q_lora_rank": 0}, "q_lora_rank must be positive, got 0"),
    (MlaConfig, MLA, {"value_dim": -1}, "value_dim must be positive, got -1"),
    (MoeConfig, MOE, {"num_groups": 3}, "num_experts must be a multiple of num_groups, got 8 and 3"),
    (MoeConfig, MOE, {"num_groups_kept": 2}, "num_groups_kept must be <= num_groups, got 2 and 1"),
    (MoeConfig, MOE, {"num_topk": 9}, "num_topk must be <= 8 .* got 9"),
    (MoeConfig, MOE, {"num_groups": 4, "num_topk": 3}, "num_topk must be <= 2 .* got 3"),
    (MoeConfig, MOE, {"num_shared_experts": -1}, "must be >= 0, got -1 and 1"),
    (MoeConfig, MOE, {"capacity_factor": 0.0}, "capacity_factor must be positive, got 0.0"),
    (MoeConfig, MOE, {"never_dropped_share": 1.5}, r"in \[0, 1\], got 1.5"),
    (MoeConfig, MOE, {"scale": float("nan")}, "scale must be positive, got nan"),
    (BalanceConfig, {}, {"device": -0.1}, "device must be >= 0, got -0.1"),
    (YarnConfig, {}, {"factor": 0.5}, "factor must be >= 1, got 0.5"),
    (YarnConfig, {}, {"beta_slow": 40.0}, "beta_fast must be > beta_slow > 0, got 32.0 and 40.0"),
    (YarnConfig, {}, {"mscale": -1.0}, "must be >= 0, got -1.0"),
    (YarnConfig, {}, {"original_max_positions": 0}, "original_max_positions must be positive, got 0"),
    (RopeConfig, {}, {"theta": 0.0}, "theta must be positive, got 0.0"),
    (RopeConfig, {}, {"linear_factor": 0.5}, "linear_factor must be >= 1, got 0.5"),
    (
        RopeConfig,
        {},
        {"linear_factor": 2.0, "yarn": YarnConfig()},
        "linear_factor must be 1 with yarn, got 2.0",
    ),
    (ModelConfig, MODEL, {"width": 0}, "width must be positive, got 0"),
    (ModelConfig, MODEL, {"eos_id": 16}, r"eos_id must be in \[0, 16\), got 16"),
]


@pytest.mark.parametrize(
    ("record", "fields", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40]
)
def test_a_bad_field_is_named_with_what_was_wanted_and_got(record, fields, changes, message):
    record(**fields)
    with pytest.raises(ValueError, match=f"{record.__name__}: .*{message}"):
        record(**{**fields, **changes})


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("v2").width = 1


def test_the_first_layers_are_dense():
    config = preset("v2_lite")
    assert [config.is_moe_layer(layer_idx) for layer_idx in range(3)] == [False, True, True]
    assert not preset("coder_1_3b").is_moe_layer(5)
