"""The gate's product on a GPU: narrow numbers multiplied into float32 without widening them first."""

import pytest
import torch

from dscoder.models.moe import gate_logits
from dscoder.testing import gpu
from dscoder.testing.cases import randn
from dscoder.testing.compare import assert_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_experts", "width"), [(64, 2048), (160, 5120), (8, 512)])
@pytest.mark.parametrize("num_tokens", [1, 3, 128, 1000])
def test_it_is_the_product_in_float64(
    num_tokens: int, num_experts: int, width: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    x_TD, weight_ED = (randn(rng, rows, width).to(gpu.DEVICE, dtype) for rows in (num_tokens, num_experts))
    with torch.no_grad():
        logits_TE = gate_logits(x_TD, weight_ED)
    assert logits_TE.dtype == torch.float32
    assert_close(logits_TE, x_TD.double() @ weight_ED.double().t())


def test_no_tokens_are_no_logits() -> None:
    x_TD = torch.empty(0, 512, device=gpu.DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        assert gate_logits(x_TD, x_TD.new_ones(8, 512)).shape == (0, 8)
