"""Stochastic rounding of float32 to bfloat16 (Gupta et al. 2015, arXiv 1502.02551).

A value becomes one of its two neighbours in bfloat16, the nearer one more often, so that the mean over many
roundings is the value itself: sixteen random bits are added below the bits that stay, and what is below them
is cut off. Updates too small to reach half the spacing, which rounding to nearest would lose each time, are
kept on average.

The random bits are a hash of a key and of the element's place in the whole parameter. They do not depend on
how a parameter is cut over ranks, nor on what was drawn before.
"""

import torch
from torch import Tensor

from dscoder.runtime.seed import derive_seed

_LANES = 4  # elements that share one 64-bit word, sixteen bits each
_KEPT = -(1 << 16)  # sign, exponent and the seven bits of mantissa that bfloat16 has
# splitmix64 (Steele et al. 2014): the counter's stride, and the shift and factor of each round.
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31


def _fold(words: Tensor, shift: int) -> Tensor:
    """words ^ (words >> shift), the shift without the sign; in place."""
    high = (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(high)


def _mix(words: Tensor) -> Tensor:
    """Each int64 hashed, in place; torch's integers wrap around."""
    for shift, factor in _ROUNDS:
        _fold(words, shift).mul_(factor)
    return _fold(words, _LAST_SHIFT)


def rounding_key(step: Tensor, *, seed: int, name: str) -> Tensor:
    """int64 scalar, on the device of `step`: what the bits of parameter `name` hang on at that step."""
    return _mix(step.long() * _STRIDE + derive_seed("rounding", seed, name))


def random_bits(key: Tensor, *, start: int, length: int) -> Tensor:
    """int32 [length] in [0, 2**16): the bits of the elements `start`, `start` + 1, ... of a whole."""
    first = start // _LANES
    last = (start + length + _LANES - 1) // _LANES
    words = torch.arange(first, last, device=key.device, dtype=torch.int64).mul_(_STRIDE).add_(key)
    lanes = _mix(words).view(torch.int16)[start - first * _LANES :][:length]
    return lanes.int().bitwise_and_((1 << 16) - 1)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of float32 `values` by `bits` (`random_bits` of as many); NaN and infinities stay."""
    cut = (values.view(torch.int32) + bits).bitwise_and_(_KEPT).view(torch.float32)
    # The sum would carry a NaN into the sign.
    return torch.where(values.isfinite(), cut, values).bfloat16()
