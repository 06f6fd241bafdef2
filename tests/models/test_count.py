"""Parameter counts: published figures, sums over the published shapes, and the built model."""

from dataclasses import replace

import pytest
import torch

from dscoder.config import PRESETS, preset
from dscoder.models import Transformer, count_parameters

# The sizes of the checkpoints on the Hugging Face hub, parameter for parameter.
PUBLISHED_TOTALS = {
    "coder_1_3b": 1_346_471_936,
    "coder_6_7b": 6_740_512_768,
    "coder_33b": 33_342_991_360,
    "coder_v15_7b": 6_910_365_696,
    "v2_lite": 15_706_484_224,
    "v2": 235_741_434_880,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED_TOTALS.items())
def test_totals_are_those_of_the_published_checkpoints(name, total):
    assert count_parameters(preset(name)).total == total


@pytest.mark.parametrize("name", PRESETS)
def test_total_is_the_sum_over_the_built_model(name):
    model = Transformer(preset(name), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(preset(name)).total


def test_v2_lite_summed_from_its_published_config():
    # hidden 2048, 27 layers, 16 heads of 128 + 64, latent 512, vocabulary 102400, experts 64 x 1408.
    attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    expert = 3 * 2048 * 1408
    layers = 27 * (attention + 2 * 2048) + 3 * 2048 * 10944
    gates = 26 * 64 * 2048
    table = 102400 * 2048
    count = count_parameters(preset("v2_lite"))
    assert count.total == layers + gates + 26 * (64 + 2) * expert + 2 * table + 2048
    assert count.active == layers + gates + 26 * (6 + 2) * expert + table + 2048


def test_v2_summed_from_its_published_config():
    # hidden 5120, 60 layers, 128 heads, query latent 1536, latent 512, experts 160 x 1536.
    query = 5120 * 1536 + 1536 + 1536 * 128 * 192
    latent = 5120 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    attention = query + latent + 128 * 128 * 5120
    expert = 3 * 5120 * 1536
    layers = 60 * (attention + 2 * 5120) + 3 * 5120 * 12288
    gates = 59 * 160 * 5120
    table = 102400 * 5120
    count = count_parameters(preset("v2"))
    assert count.total == layers + gates + 59 * (160 + 2) * expert + 2 * table + 5120
    assert count.active == layers + gates + 59 * (6 + 2) * expert + table + 5120


@pytest.mark.parametrize(("name", "billions"), [("v2_lite", 2.4), ("v2", 21.0)])
def test_active_counts_are_the_papers(name, billions):
    assert count_parameters(preset(name)).active / 1e9 == pytest.approx(billions, rel=0.025)


def test_a_tied_table_counts_once_and_is_active():
    tied = replace(preset("tiny_dense"), tie_embeddings=True)
    model = Transformer(tied, device="meta")
    count = count_parameters(tied)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.active == count.total


def test_a_big_model_builds_on_the_meta_device():
    with torch.device("meta"):
        model = Transformer(preset("v2"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
