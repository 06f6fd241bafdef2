"""LlamaForCausalLM of transformers and ours give the same numbers: DeepSeek-Coder (v1) is that model."""

import pytest
import torch
from transformers import LlamaConfig

from dscoder.config import GqaConfig, ModelConfig, RopeConfig, YarnConfig

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def model(*, attention, rope=None, **changes):
    base = {"vocab_size": 128, "width": 48, "num_layers": 3, "mlp_width": 56, "max_positions": 4096}
    return ModelConfig(**{**base, "attention": attention, "rope": rope or RopeConfig(), **changes})


CODER_ROPE = RopeConfig(theta=100000.0, linear_factor=4.0)
# The softmax scale is that of the model without YaRN: m(mscale_all_dim)^2 belongs to latent attention.
YARN_ROPE = RopeConfig(yarn=YarnConfig(original_max_positions=64, mscale=1.0, mscale_all_dim=0.5))

CASES = {
    "coder_1_3b": model(attention=GqaConfig(num_heads=4, num_kv_heads=4, head_dim=12), rope=CODER_ROPE),
    "coder_33b": model(
        attention=GqaConfig(num_heads=14, num_kv_heads=2, head_dim=16), rope=CODER_ROPE, width=56
    ),
    "coder_v15": model(attention=GqaConfig(num_heads=6, num_kv_heads=6, head_dim=8)),
    "one_key_head": model(attention=GqaConfig(num_heads=3, num_kv_heads=1, head_dim=20), rope=CODER_ROPE),
    "small_heads": model(attention=GqaConfig(num_heads=6, num_kv_heads=3, head_dim=2)),
    "wide_heads": model(attention=GqaConfig(num_heads=2, num_kv_heads=1, head_dim=160), rope=CODER_ROPE),
    "coarse_eps": model(attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=12), norm_eps=1e-2),
    "yarn": model(attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=12), rope=YARN_ROPE),
    "tied": model(attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=12), tie_embeddings=True),
}


def to_hf(config):
    """The published form of a config, written here from the published files, not from our converter."""
    rope = {"rope_theta": config.rope.theta, "rope_type": "default"}
    if config.rope.linear_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope.linear_factor}
    if config.rope.yarn is not None:
        yarn = config.rope.yarn
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
            "original_max_position_embeddings": yarn.original_max_positions,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.attention.num_heads,
        num_key_value_heads=config.attention.num_kv_heads,
        head_dim=config.attention.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
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
