"""Every preset number, written out again from the papers' tables and the published config.json files."""

import pytest

from dscoder.config import PRESETS, BalanceConfig, GqaConfig, MlaConfig, preset

V1 = {
    # name: (width, mlp_width, layers, heads, kv_heads, vocabulary, max_positions, theta, linear factor)
    "coder_1_3b": (2048, 5504, 24, 16, 16, 32256, 16384, 100000.0, 4.0),
    "coder_6_7b": (4096, 11008, 32, 32, 32, 32256, 16384, 100000.0, 4.0),
    "coder_33b": (7168, 19200, 62, 56, 8, 32256, 16384, 100000.0, 4.0),
    "coder_v15_7b": (4096, 11008, 30, 32, 32, 102400, 4096, 10000.0, 1.0),
}


@pytest.mark.parametrize("name", V1)
def test_v1_numbers(name):
    config = preset(name)
    width, mlp_width, num_layers, num_heads, num_kv_heads, vocab_size, max_positions, theta, factor = V1[name]
    assert (config.width, config.mlp_width, config.num_layers) == (width, mlp_width, num_layers)
    assert config.attention == GqaConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128)
    assert (config.vocab_size, config.max_positions) == (vocab_size, max_positions)
    assert (config.rope.theta, config.rope.linear_factor, config.rope.yarn) == (theta, factor, None)
    assert config.moe is None
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("name", "ids"),
    [("coder_33b", (32013, 32014)), ("coder_v15_7b", (100000, 100001)), ("v2", (100000, 100001))],
)
def test_begin_and_end_ids(name, ids):
    assert (preset(name).bos_id, preset(name).eos_id) == ids


def test_v2_lite_numbers():
    config = preset("v2_lite")
    assert (config.width, config.mlp_width, config.num_layers) == (2048, 10944, 27)
    assert config.attention == MlaConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    )
    moe = config.moe
    assert (moe.num_experts, moe.num_shared_experts, moe.num_topk, moe.expert_width) == (64, 2, 6, 1408)
    assert (moe.num_groups, moe.num_groups_kept, moe.scale, moe.renormalize) == (1, 1, 1.0, False)
    assert (moe.num_dense_layers, moe.capacity_factor) == (1, None)
    assert moe.balance == BalanceConfig(expert=0.001)
    assert (config.rope.yarn.mscale, config.rope.yarn.mscale_all_dim) == (0.707, 0.707)


def test_v2_numbers():
    config = preset("v2")
    assert (config.width, config.mlp_width, config.num_layers) == (5120, 12288, 60)
    assert config.attention == MlaConfig(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    )
    moe = config.moe
    assert (moe.num_experts, moe.num_shared_experts, moe.num_topk, moe.expert_width) == (160, 2, 6, 1536)
    assert (moe.num_groups, moe.num_groups_kept, moe.scale, moe.renormalize) == (8, 3, 16.0, False)
    assert (moe.num_dense_layers, moe.capacity_factor, moe.never_dropped_share) == (1, 1.0, 0.1)
    assert moe.balance == BalanceConfig(expert=0.003, device=0.05, communication=0.02)
    assert (config.rope.yarn.mscale, config.rope.yarn.mscale_all_dim) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["v2_lite", "v2"])
def test_v2_positions(name):
    config = preset(name)
    yarn = config.rope.yarn
    assert (config.vocab_size, config.max_positions, config.rope.theta) == (102400, 163840, 10000.0)
    assert (yarn.factor, yarn.original_max_positions) == (40.0, 4096)
    assert (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_eps_and_initial_spread(name):
    assert (preset(name).norm_eps, preset(name).init_std) == (1e-6, 0.006)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of coder_1_3b, .*v2_lite, got 'v3'"):
        preset("v3")
