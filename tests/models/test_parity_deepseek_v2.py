"""DeepseekV2ForCausalLM of transformers and ours give the same numbers."""

import pytest
import torch
from transformers import DeepseekV2Config

from dscoder.config import MlaConfig, ModelConfig, MoeConfig, RopeConfig, YarnConfig

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

GREEDY = {"num_experts": 10, "num_topk": 3}
GROUPED = {"num_experts": 12, "num_topk": 3, "num_groups": 4, "num_groups_kept": 2, "scale": 16.0}


def yarn(**changes):
    return RopeConfig(yarn=YarnConfig(**{"original_max_positions": 64, **changes}))


PLAIN = RopeConfig()
LITE_YARN = yarn(mscale=0.707, mscale_all_dim=0.707)
V2_YARN = yarn(mscale=1.0, mscale_all_dim=1.0)


def shape(**changes):
    base = {"num_heads": 4, "q_lora_rank": None, "kv_lora_rank": 24, "nope_dim": 16, "rope_dim": 8}
    return MlaConfig(**{**base, "value_dim": 12, **changes})


def experts(**changes):
    return MoeConfig(**{"num_shared_experts": 2, "expert_width": 20, **GREEDY, **changes})


def model(*, attention, moe, rope=PLAIN, **changes):
    base = {"vocab_size": 128, "width": 48, "num_layers": 3, "mlp_width": 56, "max_positions": 4096}
    return ModelConfig(**{**base, "attention": attention, "moe": moe, "rope": rope, **changes})


CASES = {
    "lite": model(attention=shape(), moe=experts(), rope=LITE_YARN),
    "v2": model(attention=shape(q_lora_rank=20), moe=experts(**GROUPED), rope=V2_YARN),
    "plain_rope": model(attention=shape(), moe=experts()),
    "plain_rope_q_lora": model(attention=shape(q_lora_rank=20), moe=experts(**GROUPED)),
    "linear_rope": model(attention=shape(), moe=experts(), rope=RopeConfig(linear_factor=4.0)),
    "grouped_lite_yarn": model(attention=shape(), moe=experts(**GROUPED), rope=LITE_YARN),
    "mscales_differ": model(attention=shape(), moe=experts(), rope=yarn(mscale=1.0, mscale_all_dim=0.5)),
    "yarn_betas": model(
        attention=shape(rope_dim=32), moe=experts(), rope=yarn(factor=6.5, beta_fast=8.0, beta_slow=2.0)
    ),
    "yarn_step": model(
        attention=shape(rope_dim=2), moe=experts(), rope=yarn(factor=8.0, beta_fast=1.5, beta_slow=1.2)
    ),
    "no_dense_layer": model(attention=shape(), moe=experts(num_dense_layers=0), rope=LITE_YARN),
    "two_dense_layers": model(
        attention=shape(), moe=experts(num_dense_layers=2), rope=LITE_YARN, num_layers=4
    ),
    "one_expert_a_token": model(attention=shape(), moe=experts(num_experts=7, num_topk=1)),
    "all_experts": model(attention=shape(), moe=experts(num_experts=5, num_topk=5, scale=2.5)),
    "no_shared_expert": model(attention=shape(), moe=experts(num_shared_experts=0)),
    "odd_dims": model(
        # An even latent and nope width is all that transformers can rotate next to.
        attention=shape(num_heads=3, kv_lora_rank=22, nope_dim=6, rope_dim=10, value_dim=19),
        moe=experts(expert_width=17),
        rope=V2_YARN,
    ),
    "wide_rope": model(attention=shape(nope_dim=8, rope_dim=64, value_dim=40), moe=experts(), rope=LITE_YARN),
    "one_head": model(attention=shape(num_heads=1), moe=experts()),
    "coarse_eps": model(attention=shape(q_lora_rank=20), moe=experts(), norm_eps=1e-2),
    "tied": model(attention=shape(), moe=experts(), tie_embeddings=True),
}


def to_hf(config):
    """The published form of a config, written here from the published files, not from our converter."""
    attention, moe, rope = config.attention, config.moe, config.rope
    parameters = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.linear_factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": rope.linear_factor}
    if rope.yarn is not None:
        parameters |= {
            "rope_type": "yarn",
            "factor": rope.yarn.factor,
            "beta_fast": rope.yarn.beta_fast,
            "beta_slow": rope.yarn.beta_slow,
            "mscale": rope.yarn.mscale,
            "mscale_all_dim": rope.yarn.mscale_all_dim,
            "original_max_position_embeddings": rope.yarn.original_max_positions,
        }
    return DeepseekV2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        moe_intermediate_size=moe.expert_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=attention.num_heads,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=attention.q_lora_rank,
        qk_nope_head_dim=attention.nope_dim,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.value_dim,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.num_shared_experts,
        num_experts_per_tok=moe.num_topk,
        first_k_dense_replace=moe.num_dense_layers,
        topk_method="greedy" if moe.num_groups == 1 else "group_limited_greedy",
        n_group=moe.num_groups,
        topk_group=moe.num_groups_kept,
        routed_scaling_factor=moe.scale,
        norm_topk_prob=False,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters=parameters,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",  # the grouped one refuses odd widths
    )


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_every_hidden_state_and_the_logits_agree(make_pair, config):
    pair = make_pair(to_hf(config), config)
    tokens_BS = pair.tokens(2, 150)
    for theirs, ours in pair.hidden_states(tokens_BS):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(pair.ours(tokens_BS), pair.theirs(tokens_BS).logits, **TOLERANCE)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_64_greedy_tokens_are_the_same(make_pair, config):
    pair = make_pair(to_hf(config), config)
    theirs, ours = pair.greedy(pair.tokens(2, 40), 64)
    assert theirs.unique().numel() > 4, "the case is too tame to tell models apart"
    assert torch.equal(ours, theirs)
