"""RMSNorm and the gated MLP, by hand."""

import pytest
import torch

from dscoder.models.mlp import Mlp, swiglu
from dscoder.models.norm import RMSNorm


def test_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    # mean(3^2, 4^2) = 12.5
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_norm_sums_in_float32():
    # The square of 300 overflows float16; 4096 squares summed in bfloat16 would stall at 256.
    assert RMSNorm(4, eps=1e-6, dtype=torch.float16)(torch.full((4,), 300.0).half()).tolist() == [1.0] * 4
    assert RMSNorm(4096, eps=0.0, dtype=torch.bfloat16)(torch.ones(4096).bfloat16()).unique().tolist() == [
        1.0
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_keeps_type_and_shape(dtype):
    out = RMSNorm(4, eps=1e-6, dtype=dtype)(torch.ones(2, 3, 4, dtype=dtype))
    assert (out.dtype, out.shape) == (dtype, (2, 3, 4))


def test_swiglu_gates_with_the_first_half():
    torch.testing.assert_close(swiglu(torch.tensor([0.0, 100.0, 7.0, 3.0])), torch.tensor([0.0, 300.0]))


def test_mlp_holds_gate_rows_first():
    mlp = Mlp(1, 2)
    mlp.gate_up.weight.data = torch.tensor([[100.0], [0.0], [3.0], [5.0]])
    mlp.down.weight.data = torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(mlp(torch.ones(1)), torch.tensor([300.0]))


def test_norm_gradient_is_that_of_finite_differences():
    norm = RMSNorm(5, eps=1e-2, dtype=torch.float64)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    x_TD = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)),
        (x_TD.requires_grad_(), norm.weight),
    )


def test_swiglu_gradient_is_that_of_finite_differences():
    gate_up = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(swiglu, (gate_up.requires_grad_(),))


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_half_precision_is_float32_rounded_once(dtype, has_gradient):
    x_TD = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    narrow = RMSNorm(64, eps=1e-6, dtype=dtype)
    narrow.weight.data = torch.linspace(0.5, 2.0, 64).to(dtype)
    wide_TD = x_TD.double()
    wanted_TD = (
        wide_TD * (wide_TD.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * narrow.weight.double()
    )
    with torch.set_grad_enabled(has_gradient):
        assert torch.equal(narrow(x_TD), wanted_TD.float().to(dtype))


def test_norm_is_the_same_with_and_without_a_gradient():
    norm, x_TD = RMSNorm(96, eps=1e-6), torch.randn(7, 96, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted_TD = norm(x_TD)
    torch.testing.assert_close(norm(x_TD), wanted_TD)


SECOND = {"RMSNorm": RMSNorm(4, eps=1e-6), "swiglu": swiglu}


@pytest.mark.parametrize(("name", "run"), SECOND.items(), ids=SECOND)
def test_a_second_derivative_is_refused(name, run):
    # The backward passes reuse memory and saved sums: differentiated, they would be wrong without a word.
    x_TD = torch.ones(2, 4, requires_grad=True)
    loss = run(x_TD).sum()
    with pytest.raises(RuntimeError, match=f"^{name}: the gradient must not be differentiated again"):
        torch.autograd.grad(loss, x_TD, create_graph=True)
