"""Rotary angles: plain, linearly interpolated (v1), YaRN (V2; DeepSeek-V2 section 3.1.4, arXiv 2309.00071).

Everything is computed from the positions of one call, once for all layers. There is no table to be sized,
saved, cast to bfloat16 by accident, or left empty when a model leaves the meta device.
"""

import math

import torch
from torch import Tensor

from dscoder.config import RopeConfig, YarnConfig


def magnitude(factor: float, mscale: float) -> float:
    """m(mscale) = 0.1 * mscale * ln(factor) + 1: how much longer contexts sharpen the attention."""
    return 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(rope: RopeConfig, qk_dim: int) -> float:
    """Latent attention's scale: 1 / sqrt(qk_dim), times m(mscale_all_dim)^2 under YaRN."""
    scale = 1.0 / math.sqrt(qk_dim)
    if rope.yarn is not None:
        scale *= magnitude(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def ramp_ends(yarn: YarnConfig, *, theta: float, dim: int) -> tuple[float, float]:
    """First and last frequency index of the ramp from kept to interpolated frequencies.

    A frequency that turns `beta_fast` times or more within the trained context is kept, one that turns
    `beta_slow` times or less is interpolated in full. The ends are whole numbers clamped to [0, dim - 1], as
    the published weights were trained with, although frequency indices stop at dim / 2 - 1.
    """

    def index(num_turns: float) -> float:
        return dim * math.log(yarn.original_max_positions / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(yarn.beta_fast)), 0)
    high = min(math.ceil(index(yarn.beta_slow)), dim - 1)
    # A ramp of no length is a step: the published code's small width keeps the division finite.
    return float(low), high + 0.001 if high == low else float(high)


def frequencies(rope: RopeConfig, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Radians per position of each rotated pair: float32 [dim / 2], on `device`, without a host copy."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    periods = rope.theta**exponents
    if rope.yarn is None:
        return 1.0 / periods / rope.linear_factor
    low, high = ramp_ends(rope.yarn, theta=rope.theta, dim=dim)
    indices = torch.arange(dim // 2, dtype=torch.float32, device=device)
    interpolated_share = ((indices - low) / (high - low)).clamp(0.0, 1.0)
    kept_share = 1.0 - interpolated_share
    return (1.0 / (rope.yarn.factor * periods)) * (1.0 - kept_share) + (1.0 / periods) * kept_share


def rotations(rope: RopeConfig, dim: int, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, dim / 2], of the angles at `positions_T`.

    Under YaRN both are multiplied by m(mscale) / m(mscale_all_dim), which is 1 in both published configs.
    """
    angles_Tf = positions_T.float()[:, None] * frequencies(rope, dim, device=positions_T.device)
    cos_Tf, sin_Tf = angles_Tf.cos(), angles_Tf.sin()
    if rope.yarn is None or rope.yarn.mscale == rope.yarn.mscale_all_dim:
        return cos_Tf, sin_Tf
    ratio = magnitude(rope.yarn.factor, rope.yarn.mscale) / magnitude(
        rope.yarn.factor, rope.yarn.mscale_all_dim
    )
    return cos_Tf * ratio, sin_Tf * ratio
