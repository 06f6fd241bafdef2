"""Latent attention: the equations of the paper, and its training and absorbed forms, in float64."""

from dataclasses import replace

import pytest
import torch

from dscoder.config import MlaConfig, ModelConfig, RopeConfig, YarnConfig
from dscoder.models import allocate_cache
from dscoder.models.mla import LatentAttention
from dscoder.models.placement import place
from dscoder.models.yarn import rotations, softmax_scale

LITE = MlaConfig(num_heads=3, q_lora_rank=None, kv_lora_rank=20, nope_dim=6, rope_dim=4, value_dim=9)
YARN = RopeConfig(yarn=YarnConfig(factor=8.0, original_max_positions=32))


def build(attention):
    config = ModelConfig(
        vocab_size=8, width=16, num_layers=1, mlp_width=8, attention=attention, rope=YARN, norm_eps=1e-3
    )
    layer = LatentAttention(config, attention, layer_idx=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(float(parameter.dim() == 1), 0.4, generator=generator)
    return config, layer.requires_grad_(False)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def turn(x_Sr, cos_Sf, sin_Sf):
    """Each neighbouring pair as one complex number, times e^(i angle)."""
    pairs = torch.view_as_complex(x_Sr.reshape(len(x_Sr), -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos_Sf, sin_Sf)).flatten(1)


def equations(layer, attention, x_SD):
    """DeepSeek-V2 eqs 37-47, head by head, token by token."""
    n, r, v, rank = attention.nope_dim, attention.rope_dim, attention.value_dim, attention.kv_lora_rank
    cos_Sf, sin_Sf = (x.double() for x in rotations(YARN, r, torch.arange(len(x_SD))))
    down_SX = layer.latent_down(x_SD)
    latent_SC = layer.latent_norm(down_SX[:, :rank])
    key_Sr = turn(down_SX[:, rank:], cos_Sf, sin_Sf)
    query_SX = (
        layer.query_up(layer.query_norm(layer.query_down(x_SD)))
        if attention.q_lora_rank
        else layer.query(x_SD)
    )
    up_SX = layer.latent_up(latent_SC)
    heads = []
    for head in range(attention.num_heads):
        query_Sn, query_Sr = query_SX[:, head * (n + r) :][:, : n + r].split([n, r], dim=1)
        key_Sn, value_Sv = up_SX[:, head * (n + v) :][:, : n + v].split([n, v], dim=1)
        scores = query_Sn @ key_Sn.t() + turn(query_Sr, cos_Sf, sin_Sf) @ key_Sr.t()
        rows = [
            (scores[t, : t + 1] * softmax_scale(YARN, n + r)).softmax(dim=0) @ value_Sv[: t + 1]
            for t in range(len(x_SD))
        ]
        heads.append(torch.stack(rows))
    return layer.out(torch.cat(heads, dim=1))


ATTENTIONS = [LITE, replace(LITE, q_lora_rank=10), replace(LITE, num_heads=1, value_dim=2, rope_dim=16)]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=["lite", "query_latent", "wide_rope"])
def test_training_form_is_the_equations(attention):
    config, layer = build(attention)
    x_SD = randn(9, 16)
    placement = place_tokens(config, 1, 9)
    torch.testing.assert_close(layer(x_SD, placement), equations(layer, attention, x_SD))


@pytest.mark.parametrize("attention", ATTENTIONS, ids=["lite", "query_latent", "wide_rope"])
def test_absorbed_form_agrees_with_training_form(attention):
    config, layer = build(attention)
    x_BSD = randn(2, 90, 16)
    wanted_TD = layer(x_BSD.flatten(0, 1), place_tokens(config, 2, 90))
    cache = allocate_cache(config, num_sequences=2, max_positions=90, dtype=torch.float64)
    got = []
    # The first chunk takes the training form; the others cross a page of 64 in the absorbed one.
    for start, end in [(0, 5), (5, 70), (70, 71), (71, 90)]:
        placement = place_tokens(config, 2, end - start, cache=cache)
        chunk_TD = layer(x_BSD[:, start:end].flatten(0, 1), placement)
        cache.commit(placement.append)
        got.append(chunk_TD.view(2, end - start, 16))
    torch.testing.assert_close(torch.cat(got, dim=1).flatten(0, 1), wanted_TD)


@pytest.mark.parametrize(
    "attention",
    [replace(LITE, kv_lora_rank=21), replace(LITE, num_heads=1, nope_dim=7)],
    ids=["odd_latent", "one_head_odd_nope"],
)
@pytest.mark.parametrize("num_prompt", [1, 2])
def test_one_row_decodes_token_by_token_at_odd_widths(attention, num_prompt):
    config, layer = build(attention)
    x_SD = randn(4, 16)
    cache = allocate_cache(config, num_sequences=1, max_positions=4, dtype=torch.float64)
    got = []
    for chunk_SD in x_SD.split([num_prompt] + [1] * (4 - num_prompt)):
        placement = place_tokens(config, 1, len(chunk_SD), cache=cache)
        got.append(layer(chunk_SD, placement))
        cache.commit(placement.append)
    torch.testing.assert_close(torch.cat(got), layer(x_SD, place_tokens(config, 1, 4)))


def test_cache_holds_the_normed_latent_and_the_rotated_key():
    config, layer = build(LITE)
    x_SD = randn(3, 16)
    cache = allocate_cache(config, num_sequences=1, max_positions=3, dtype=torch.float64)
    layer(x_SD, place_tokens(config, 1, 3, cache=cache))
    down_SX = layer.latent_down(x_SD)
    cos_Sf, sin_Sf = (x.double() for x in rotations(YARN, 4, torch.arange(3)))
    entries = cache.pages[0][cache.page_table_BN[0, 0].item(), :3]
    torch.testing.assert_close(entries[:, :20], layer.latent_norm(down_SX[:, :20]))
    torch.testing.assert_close(entries[:, 20:], turn(down_SX[:, 20:], cos_Sf, sin_Sf))


def test_latent_norms_keep_their_own_eps():
    config, layer = build(replace(LITE, q_lora_rank=10))
    assert config.norm_eps == 1e-3
    assert (layer.latent_norm.eps, layer.query_norm.eps) == (1e-6, 1e-6)


def place_tokens(config, num_rows, length, *, cache=None):
    tokens_BS = torch.zeros(num_rows, length, dtype=torch.int64)
    return place(config, tokens_BS, cu_seqlens=None, cache=cache, num_new_B=None, drops_tokens=False)
