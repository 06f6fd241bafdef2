"""Small models of every kind of layer, with weights that are not their initial ones."""

from dataclasses import replace

import pytest
import torch

from dscoder.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig, YarnConfig
from dscoder.models import Transformer

LATENT = MlaConfig(num_heads=2, q_lora_rank=None, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=6)
EXPERTS = MoeConfig(num_experts=6, num_shared_experts=2, num_topk=2, expert_width=10)
YARN = YarnConfig(factor=4.0, original_max_positions=32)
LITE = ModelConfig(
    vocab_size=64,
    width=32,
    num_layers=3,
    mlp_width=24,
    attention=LATENT,
    moe=EXPERTS,
    rope=RopeConfig(yarn=YARN),
    max_positions=128,
)
DENSE = replace(
    LITE,
    attention=GqaConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=None,
    rope=RopeConfig(theta=100000.0, linear_factor=4.0),
)
CONFIGS = {
    "lite": LITE,
    "grouped": replace(
        LITE,
        attention=replace(LATENT, q_lora_rank=12),
        moe=replace(EXPERTS, num_groups=3, num_groups_kept=2, scale=4.0, num_dense_layers=0),
        rope=RopeConfig(yarn=replace(YARN, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "two_dense_layers": replace(LITE, moe=replace(EXPERTS, num_dense_layers=2), rope=RopeConfig()),
    "linear_rope": replace(LITE, rope=RopeConfig(linear_factor=2.0)),
    "no_shared_experts": replace(LITE, moe=replace(EXPERTS, num_shared_experts=0)),
    "dense_latent": replace(LITE, moe=None),
    "one_mscale": replace(LITE, rope=RopeConfig(yarn=replace(YARN, mscale=0.5, mscale_all_dim=0.0))),
    "other_mscale": replace(LITE, rope=RopeConfig(yarn=replace(YARN, mscale=0.0, mscale_all_dim=0.5))),
    "tied_latent": replace(LITE, tie_embeddings=True),
    "dense": DENSE,
    "tied_dense": replace(DENSE, tie_embeddings=True),
    "wide_heads": replace(DENSE, attention=GqaConfig(num_heads=4, num_kv_heads=1, head_dim=12)),
    "coarse_eps": replace(DENSE, norm_eps=1e-2),
    "dense_yarn": replace(DENSE, rope=RopeConfig(yarn=replace(YARN, mscale=1.0, mscale_all_dim=0.0))),
    "dense_one_mscale": replace(DENSE, rope=RopeConfig(yarn=replace(YARN, mscale=0.5, mscale_all_dim=0.0))),
}


@torch.no_grad()
def build(config, *, dtype=torch.float32):
    """Wide random weights, norms away from 1, so that no two tensors can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config, dtype=dtype).eval()
    for parameter in model.parameters():
        mean = float(parameter.dim() == 1)
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, 0.2, generator=generator))
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    """A model of each kind."""
    return build(CONFIGS[request.param])


@pytest.fixture
def lite():
    """The smallest model with both a dense layer and experts."""
    return build(LITE)


@pytest.fixture
def tied():
    """A model whose head is its embedding."""
    return build(CONFIGS["tied_dense"])


@pytest.fixture
def tokens():
    """Enough positions to leave the trained context of the YaRN configs."""
    return torch.randint(0, LITE.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
