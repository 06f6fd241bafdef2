"""Rotary angles against numbers worked out by hand."""

import math

import pytest
import torch

from dscoder.config import PRESETS, RopeConfig, YarnConfig
from dscoder.models.yarn import frequencies, magnitude, ramp_ends, rotations, softmax_scale


def test_plain_frequencies_fall_from_1_to_almost_1_over_theta():
    got = frequencies(RopeConfig(theta=100.0), 4)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.1]))


def test_linear_scaling_divides_every_position():
    rope = RopeConfig(theta=100000.0, linear_factor=4.0)
    cos_Tf, sin_Tf = rotations(rope, 8, torch.tensor([20]))
    plain_cos_Tf, plain_sin_Tf = rotations(RopeConfig(theta=100000.0), 8, torch.tensor([5]))
    torch.testing.assert_close(cos_Tf, plain_cos_Tf)
    torch.testing.assert_close(sin_Tf, plain_sin_Tf)


def test_published_ramp_runs_from_pair_10_to_pair_23():
    # 64 * ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 10.47; with 1 turn instead of 32: 22.51.
    yarn = PRESETS["v2_lite"].rope.yarn
    assert ramp_ends(yarn, theta=10000.0, dim=64) == (10.0, 23.0)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_by_the_factor():
    rope = PRESETS["v2_lite"].rope
    got, plain = frequencies(rope, 64), frequencies(RopeConfig(), 64)
    torch.testing.assert_close(got[:11], plain[:11])
    torch.testing.assert_close(got[23:], plain[23:] / 40.0)
    # Half way up the ramp, pair 16.5, both weigh the same; pair 16 is 6 / 13 of the way.
    torch.testing.assert_close(got[16], plain[16] * (7 / 13 + 6 / 13 / 40))


def test_a_ramp_without_length_is_a_step():
    yarn = YarnConfig(factor=8.0, original_max_positions=64, beta_fast=1.0, beta_slow=0.9)
    low, high = ramp_ends(yarn, theta=10000.0, dim=2)
    assert low < high
    assert frequencies(RopeConfig(yarn=yarn), 2).isfinite().all()


@pytest.mark.parametrize(("name", "mscale"), [("v2_lite", 0.707), ("v2", 1.0)])
def test_published_softmax_scale_is_the_square_of_the_magnitude(name, mscale):
    wanted = (0.1 * mscale * math.log(40.0) + 1.0) ** 2 / math.sqrt(192)
    assert softmax_scale(PRESETS[name].rope, 192) == pytest.approx(wanted, rel=1e-12)


def test_cos_and_sin_carry_the_ratio_of_the_two_magnitudes():
    positions_T = torch.arange(7)
    yarn = {"factor": 10.0, "original_max_positions": 64}
    equal = rotations(RopeConfig(yarn=YarnConfig(**yarn, mscale=0.5, mscale_all_dim=0.5)), 16, positions_T)
    differ = rotations(RopeConfig(yarn=YarnConfig(**yarn, mscale=1.0, mscale_all_dim=0.0)), 16, positions_T)
    ratio = magnitude(10.0, 1.0)
    assert ratio == pytest.approx(0.1 * math.log(10.0) + 1.0)
    torch.testing.assert_close(differ[0], equal[0] * ratio)
    torch.testing.assert_close(differ[1], equal[1] * ratio)


def test_angles_stay_float32_for_positions_beyond_bfloat16():
    cos_Tf, _ = rotations(RopeConfig(), 4, torch.tensor([163839]))
    assert cos_Tf.dtype == torch.float32
    assert cos_Tf[0, 0].item() == pytest.approx(math.cos(163839.0), abs=1e-6)
