"""Rounding at random: to a neighbour, right on average, by the place in the whole alone."""

import pytest
import torch

from dscoder.train.rounding import random_bits, round_stochastically, rounding_key

NUM_DRAWS = 1 << 18


def bits_at(
    *, seed: int = 1, step: float = 3.0, name: str = "w", start: int = 0, length: int
) -> torch.Tensor:
    key = rounding_key(torch.tensor(step), seed=seed, name=name)
    return random_bits(key, start=start, length=length)


def test_bits_hang_on_the_place_alone() -> None:
    whole = bits_at(length=1001)
    for start, length in [(0, 1), (1, 7), (3, 998), (4, 4), (500, 501), (1000, 1), (17, 0)]:
        assert torch.equal(bits_at(start=start, length=length), whole[start : start + length])


def test_places_beyond_32_bits_have_bits_of_their_own() -> None:
    far = 1 << 33
    assert torch.equal(bits_at(start=far + 2, length=9), bits_at(start=far, length=11)[2:])
    assert not torch.equal(bits_at(start=far, length=64), bits_at(start=0, length=64))


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 4.0}, {"name": "v"}])
def test_seed_step_and_name_each_change_the_bits(other: dict[str, object]) -> None:
    one, two = bits_at(length=NUM_DRAWS).double(), bits_at(length=NUM_DRAWS, **other).double()
    correlation = torch.corrcoef(torch.stack([one, two]))[0, 1]
    assert abs(correlation) < 5 / NUM_DRAWS**0.5


@pytest.mark.parametrize("apart", [1, 2, 3, 4, 5])
def test_bits_are_even_and_neighbours_have_nothing_to_do_with_each_other(apart: int) -> None:
    bits = bits_at(length=NUM_DRAWS)
    counts = torch.bincount(bits >> 10, minlength=64)
    assert counts.sum() == NUM_DRAWS
    assert len(counts) == 64
    assert (counts.double() / NUM_DRAWS * 64 - 1).abs().max() < 5 * (64 / NUM_DRAWS) ** 0.5
    correlation = torch.corrcoef(torch.stack([bits[:-apart], bits[apart:]]).double())[0, 1]
    assert abs(correlation) < 5 / NUM_DRAWS**0.5


@pytest.mark.parametrize("value", [1.0 + 0.1 / 128, -(1.0 + 0.7 / 128), 3.1e-4, -2.7e20, 1e-40])
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    values = torch.full((NUM_DRAWS,), value)
    rounded = round_stochastically(values, bits_at(length=NUM_DRAWS))
    low, high = rounded.double().aminmax()
    wanted = values[0].double()
    assert low < wanted < high
    assert rounded.unique().numel() == 2
    # Half a spacing is the largest deviation of one draw; five of the mean's.
    assert abs(rounded.double().mean() - wanted) < 5 * (high - low) / 2 / NUM_DRAWS**0.5


def test_what_bfloat16_holds_stays() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bits in (0, 1, (1 << 16) - 1):
        rounded = round_stochastically(values.float(), torch.full((1000,), bits, dtype=torch.int32))
        assert torch.equal(rounded, values)


@pytest.mark.parametrize("bits", [0, 1, (1 << 16) - 1])
def test_nan_and_infinities_stay(bits: int) -> None:
    patterns = torch.tensor(
        [0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32
    )
    values = patterns.view(torch.float32)
    rounded = round_stochastically(values, torch.full((6,), bits, dtype=torch.int32))
    assert rounded[:4].isnan().all()
    assert rounded[4:].tolist() == [torch.inf, -torch.inf]
