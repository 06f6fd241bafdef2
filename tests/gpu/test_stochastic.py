"""Rounding at random on a GPU: the bits of the CPU, steps that hang on no layout and wait for nothing."""

import pytest
import torch
from torch import Tensor, nn

from dscoder.config.train import OptimizerConfig
from dscoder.models.sharding import Part
from dscoder.testing import gpu
from dscoder.train import stochastic
from dscoder.train.rounding import random_bits, round_stochastically, rounding_key
from dscoder.train.stochastic import StochasticAdamW

CONFIG = OptimizerConfig()
NUM_ELEMENTS = 100_003


def bits_on(device: str | torch.device) -> Tensor:
    key = rounding_key(torch.tensor(3.0, device=device), seed=1, name="w")
    return random_bits(key, start=12_345, length=NUM_ELEMENTS)


def test_bits_and_rounding_are_those_of_the_cpu() -> None:
    bits = bits_on("cpu")
    assert torch.equal(bits_on(gpu.DEVICE).cpu(), bits)
    values = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    there = round_stochastically(values.to(gpu.DEVICE), bits.to(gpu.DEVICE)).cpu()
    here = round_stochastically(values, bits)
    assert torch.equal(there.view(torch.int16)[1:], here.view(torch.int16)[1:])
    assert there[0].isnan()


def stepped(rng: torch.Generator, *, chunk: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The weights after three steps, `chunk` elements at once."""
    monkeypatch.setattr(stochastic, "_GPU_CHUNK", chunk)
    rng.manual_seed(5)
    weight, *gradients = (torch.randn(NUM_ELEMENTS, generator=rng, device=rng.device) for _ in range(4))
    parameter = nn.Parameter(weight.to(gpu.DEVICE).bfloat16())
    part = Part(name="w", parameter=parameter, whole_shape=(NUM_ELEMENTS,))
    adam = StochasticAdamW({"w": part}, CONFIG, seed=7)
    moved = [gradient.to(gpu.DEVICE) for gradient in gradients]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gradient in moved:
            adam.gradients["w"] = gradient
            adam.step(0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return part.local


def test_steps_wait_for_nothing_and_do_not_hang_on_how_they_are_cut(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = stepped(rng, chunk=1 << 22, monkeypatch=monkeypatch)
    assert torch.equal(stepped(rng, chunk=1013, monkeypatch=monkeypatch), at_once)
