"""config.json both ways: the published files, both rope forms, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.checkpoint import config_from_hf, config_to_hf
from dscoder.checkpoint.config_hf import dtype_from_hf
from dscoder.config import (
    PRESETS,
    BalanceConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    YarnConfig,
    preset,
)

# The published files (huggingface.co/deepseek-ai).
PUBLISHED = {
    path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "published").iterdir()
}
CODER_1_3B, V2_LITE = PUBLISHED["coder_1_3b"], PUBLISHED["v2_lite"]
PUBLISHED_INIT_STD = 0.02  # what the files say; the papers trained with 0.006
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}


def v2_lite(**changes):
    return V2_LITE | changes


def llama(**changes):
    return CODER_1_3B | changes


@pytest.mark.parametrize("name", ["coder_1_3b", "coder_33b", "v2_lite"])
def test_the_published_files_are_the_presets(name):
    assert config_from_hf(PUBLISHED[name]) == replace(preset(name), init_std=PUBLISHED_INIT_STD)


def test_the_published_v2_file_is_the_preset_but_for_the_training_losses():
    wanted = preset("v2")
    moe = replace(wanted.moe, balance=BalanceConfig(expert=0.001), capacity_factor=None)
    assert config_from_hf(PUBLISHED["v2"]) == replace(wanted, moe=moe, init_std=PUBLISHED_INIT_STD)


def test_transformers_5_says_the_same_in_rope_parameters():
    lite = {key: value for key, value in V2_LITE.items() if key not in ("rope_scaling", "rope_theta")}
    scaling = {key: value for key, value in V2_LITE["rope_scaling"].items() if key != "type"}
    lite |= {
        "rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 10000.0},
        "head_dim": 64,
        "qk_head_dim": 192,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "output_router_logits": False,
    }
    assert config_from_hf(lite) == config_from_hf(V2_LITE)


def test_both_rope_forms_may_stand_together_if_they_agree():
    both = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0})
    assert config_from_hf(both) == config_from_hf(CODER_1_3B)


def test_a_file_of_transformers_4_may_name_the_rope_type_twice():
    scaling = {"factor": 4.0, "type": "linear", "rope_type": "linear"}
    assert config_from_hf(llama(rope_scaling=scaling)) == config_from_hf(CODER_1_3B)


def test_plain_rope_is_null_default_or_absent():
    plain = config_from_hf(llama(rope_scaling=None))
    assert plain.rope == RopeConfig(theta=100000.0)
    assert config_from_hf(llama(rope_scaling={"rope_type": "default"})) == plain
    absent = {key: value for key, value in CODER_1_3B.items() if not key.startswith("rope")}
    assert config_from_hf(absent).rope == RopeConfig(theta=10000.0)


def test_yarn_takes_the_defaults_of_the_published_code():
    rope = config_from_hf(v2_lite(rope_scaling=YARN)).rope
    assert rope.yarn == YarnConfig(factor=8.0, original_max_positions=512, mscale=1.0, mscale_all_dim=0.0)


def test_absent_fields_take_the_defaults_of_the_published_classes():
    keys = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "torch_dtype")
    assert config_from_hf({k: v for k, v in CODER_1_3B.items() if k not in keys}) == config_from_hf(
        CODER_1_3B
    )


def test_a_head_dim_of_its_own_is_read():
    attention = config_from_hf(llama(head_dim=64)).attention
    assert attention == GqaConfig(num_heads=16, num_kv_heads=16, head_dim=64)


def test_greedy_gating_ignores_the_groups():
    moe = config_from_hf(v2_lite(n_group=8, topk_group=3)).moe
    assert (moe.num_groups, moe.num_groups_kept) == (1, 1)


def test_normalised_weights_are_not_scaled():
    moe = config_from_hf(v2_lite(norm_topk_prob=True, routed_scaling_factor=16.0)).moe
    assert (moe.renormalize, moe.scale) == (True, 1.0)


def test_a_single_expert_is_scaled_and_never_normalised():
    changes = {"norm_topk_prob": True, "routed_scaling_factor": 16.0, "num_experts_per_tok": 1}
    moe = config_from_hf(v2_lite(**changes)).moe
    assert (moe.renormalize, moe.scale) == (False, 16.0)


@pytest.mark.parametrize("shared", [0, None])
def test_shared_experts_may_be_absent(shared):
    assert config_from_hf(v2_lite(n_shared_experts=shared)).moe.num_shared_experts == 0


def test_without_routed_experts_every_layer_is_dense():
    assert config_from_hf(v2_lite(n_routed_experts=None)).moe is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (v2_lite(model_type="deepseek_v3"), "model_type must be 'llama' or 'deepseek_v2', got 'deepseek_v3'"),
        (v2_lite(architectures=["DeepseekV2ForSequenceClassification"]), "architectures must be"),
        (v2_lite(hidden_act="gelu"), "hidden_act must be 'silu' or absent, got 'gelu'"),
        (v2_lite(attention_bias=True), "attention_bias must be False or absent, got True"),
        (v2_lite(mlp_bias=True), "mlp_bias must be False or absent, got True"),
        (v2_lite(attention_dropout=0.1), "attention_dropout must be 0 or absent, got 0.1"),
        (v2_lite(scoring_func="sigmoid"), "scoring_func must be 'softmax' or absent, got 'sigmoid'"),
        (
            v2_lite(topk_method="noaux_tc"),
            "topk_method must be 'greedy' or 'group_limited_greedy', got 'noaux",
        ),
        (v2_lite(moe_layer_freq=2), "moe_layer_freq must be 1 or absent, got 2"),
        (v2_lite(seq_aux=False), "seq_aux must be true while aux_loss_alpha > 0"),
        (v2_lite(num_key_value_heads=4), "num_key_value_heads must be 16 or absent, got 4"),
        (v2_lite(head_dim=128), "head_dim must be 64 or absent, got 128"),
        (
            v2_lite(topk_method="group_limited_greedy", n_group=None),
            "n_group must be an integer, got nothing",
        ),
        (
            v2_lite(topk_method="group_limited_greedy", n_group=7),
            r"n_group must be a divisor .*\(64\), got 7",
        ),
        (
            v2_lite(topk_method="group_limited_greedy", topk_group=2),
            r"topk_group must be in \[1, n_group = 1\]",
        ),
        (v2_lite(kv_lora_rank=None), "kv_lora_rank must be an integer, got nothing"),
        (v2_lite(kv_lora_rank=2**31), "kv_lora_rank must be at most 2147483647 in magnitude, got 2147483648"),
        (v2_lite(vocab_size=-(10**30)), "vocab_size must be at most 2147483647 in magnitude, got -1000"),
        (v2_lite(rms_norm_eps=10**400), "rms_norm_eps must be a finite number, got 1000"),
        (v2_lite(rms_norm_eps=math.nan), "rms_norm_eps must be a finite number, got nan"),
        (v2_lite(rms_norm_eps=-math.inf), "rms_norm_eps must be a finite number, got -inf"),
        (v2_lite(kv_lora_rank=512.0), "kv_lora_rank must be an integer, got 512.0"),
        (v2_lite(norm_topk_prob="no"), "norm_topk_prob must be true or false, got 'no'"),
        (v2_lite(rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number, got nan"),
        (v2_lite(eos_token_id=[1, 2]), r"eos_token_id must be one token id, got \[1, 2\]"),
        (v2_lite(bos_token_id=None), "bos_token_id must be one token id, got nothing"),
        (
            v2_lite(quantization_config={"bits": 4}),
            r"quantization_config must be absent .*, got \{'bits': 4\}",
        ),
        (v2_lite(sliding_window=4096), "sliding_window must be absent .*, got 4096"),
        (v2_lite(dscoder={"colour": 1}), "dscoder.colour must be absent"),
        (v2_lite(rope_scaling="yarn"), "rope_scaling must be an object, got 'yarn'"),
        (
            v2_lite(rope_scaling=YARN | {"rope_type": "longrope"}),
            "rope_scaling.rope_type must be 'default' or",
        ),
        (v2_lite(rope_scaling=YARN | {"type": "linear"}), "rope_scaling.rope_type must be 'linear', as type"),
        (v2_lite(rope_scaling=YARN | {"truncate": False}), "rope_scaling.truncate must be True or absent"),
        (
            v2_lite(rope_scaling=YARN | {"attention_factor": 1.5}),
            "rope_scaling.attention_factor must be 1.20",
        ),
        (v2_lite(rope_scaling=YARN | {"short_factor": [1.0]}), "rope_scaling.short_factor must be absent"),
        (
            v2_lite(rope_scaling=YARN | {"rope_theta": 5.0}),
            "rope_scaling.rope_theta must be 10000.0, as outs",
        ),
        (
            v2_lite(rope_scaling={"type": "yarn", "factor": 8.0}),
            "rope_scaling.original_max_position_embeddings must be an integer, got nothing",
        ),
        (
            v2_lite(rope_parameters={"rope_type": "default"}),
            "rope_parameters must be absent or equal to rope_",
        ),
        (v2_lite(partial_rotary_factor=0.5), "partial_rotary_factor must be 1.0 or absent, got 0.5"),
        (llama(hidden_size=2049), "hidden_size must be a multiple of 16 heads, got 2049"),
        (
            llama(num_key_value_heads=5),
            r"num_key_value_heads must be a divisor of num_attention_heads \(16\)",
        ),
        (llama(rope_scaling={"type": "linear"}), "rope_scaling.factor must be a finite number, got nothing"),
        (
            llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
            "rope_scaling.type must be 'default' or 'lin",
        ),
        (
            # transformers would rotate with 1.147 here, the published rule says 1.208 / 1.
            llama(rope_scaling=YARN | {"mscale": 0.707}),
            "rope_scaling.attention_factor must be 1.147.*, got 1.20",
        ),
    ],
)
def test_what_the_model_does_not_implement_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=f"config_from_hf: {message}"):
        config_from_hf(data)


def test_a_long_refused_value_is_cut_short():
    with pytest.raises(ValueError, match=r"\.\.\.$") as error:
        config_from_hf(v2_lite(compression_config={"groups": ["x" * 1000]}))
    assert len(str(error.value)) < 250


TINY_LATENT = MlaConfig(num_heads=2, q_lora_rank=12, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=6)
TINY_EXPERTS = MoeConfig(num_experts=8, num_shared_experts=1, num_topk=2, expert_width=16)


def tiny(**changes):
    base = {"vocab_size": 64, "width": 32, "num_layers": 2, "mlp_width": 48, "attention": TINY_LATENT}
    return ModelConfig(**(base | {"moe": TINY_EXPERTS} | changes))


ROUND_TRIPS = {
    **PRESETS,
    "everything": tiny(
        moe=replace(
            TINY_EXPERTS,
            num_groups=4,
            num_groups_kept=2,
            scale=2.5,
            num_dense_layers=0,
            balance=BalanceConfig(expert=0.1, device=0.2, communication=0.3),
            capacity_factor=1.25,
            never_dropped_share=0.25,
        ),
        rope=RopeConfig(
            theta=500.0,
            yarn=YarnConfig(
                factor=3.5,
                original_max_positions=7,
                beta_fast=9.0,
                beta_slow=0.5,
                mscale=0.3,
                mscale_all_dim=0.0,
            ),
        ),
        norm_eps=1e-5,
        init_std=0.1,
        tie_embeddings=True,
        bos_id=5,
        eos_id=6,
    ),
    "normalised": tiny(moe=replace(TINY_EXPERTS, renormalize=True)),
    "all_groups_kept": tiny(moe=replace(TINY_EXPERTS, num_groups=2, num_groups_kept=2)),
    "no_shared_experts": tiny(moe=replace(TINY_EXPERTS, num_shared_experts=0)),
    "dense_latent": tiny(moe=None),
    "wide_heads": tiny(attention=GqaConfig(num_heads=3, num_kv_heads=1, head_dim=10), moe=None),
    "dense_yarn": tiny(
        attention=GqaConfig(num_heads=2, num_kv_heads=1, head_dim=16),
        moe=None,
        rope=RopeConfig(yarn=YarnConfig(mscale=0.5, mscale_all_dim=0.0)),
    ),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_config_survives_the_round_trip(config):
    assert config_from_hf(config_to_hf(config)) == config


def test_the_type_of_the_weights_survives_the_round_trip():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert dtype_from_hf(config_to_hf(tiny(), dtype=dtype)) == dtype
    assert dtype_from_hf({"torch_dtype": None, "dtype": "float32"}) == torch.float32
    assert dtype_from_hf({}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            tiny(attention=GqaConfig(num_heads=2, num_kv_heads=1, head_dim=16)),
            "moe must be None with GqaConfig",
        ),
        (tiny(moe=replace(TINY_EXPERTS, renormalize=True, scale=2.0)), "got num_topk 2 and scale 2.0"),
        (tiny(moe=replace(TINY_EXPERTS, renormalize=True, num_topk=1)), "got num_topk 1 and scale 1.0"),
    ],
)
def test_what_the_published_form_cannot_hold_is_refused(config, message):
    with pytest.raises(ValueError, match=f"config_to_hf: .*{message}"):
        config_to_hf(config)


def test_an_unknown_type_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch.int8"):
        config_to_hf(tiny(), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"torch_dtype must be one of .*, got 'float8_e4m3fn'"):
        dtype_from_hf({"torch_dtype": "float8_e4m3fn"})
