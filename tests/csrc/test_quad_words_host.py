"""The exchange by which the sm_90a products store whole words, on the host executor."""

from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_alternating", [False, True], ids=["neighbours", "gate and up"])
def test_each_word_is_eight_columns_of_a_row(
    host_kernels: ModuleType, is_alternating: bool, seed: int
) -> None:
    host_kernels.set_order(seed)
    tile = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    bits = host_kernels.quad_words(tile.numpy(), is_alternating).view(np.int16)
    got = torch.from_numpy(bits).view(torch.bfloat16).view(2, 16, 32)
    blocks = tile.view(16, 8, 8)
    parts = (blocks[:, 0::2], blocks[:, 1::2]) if is_alternating else (blocks[:, :4], blocks[:, 4:])
    assert torch.equal(got, torch.stack(parts).reshape(2, 16, 32).bfloat16())
