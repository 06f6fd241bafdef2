"""The Python side of the gradients of mla_prefill, the host executor in place of a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_close, assert_op_registered, assert_same
from dscoder.testing.poison import with_strides
from dscoder.testing.prefill import SCALE, WIDTHS, Lengths, PrefillCase, apart, prefill_case
from dscoder.testing.prefill_gradients import Gradients, assert_gradients_near, deterministic_algorithms

UseKernels = Callable[..., None]
Calls = list[tuple[Any, ...]]

OPS = ("mla_prefill", "mla_prefill_backward")
LENGTHS: Lengths = ((70, 90), (0, 3), (1, 1), (9, 4), (33, 33))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


@pytest.fixture
def calls(host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments of each launch."""
    seen: Calls = []
    binding = host_ops.mla_prefill_backward

    def run(*args: Any) -> None:
        seen.append(args)
        binding(*args)

    monkeypatch.setattr(host_ops, "mla_prefill_backward", run)
    return seen


def grad_of(rng: torch.Generator, case: PrefillCase) -> Tensor:
    q, _, v, *_ = case
    return randn(rng, *q.shape[:2], v.shape[2], dtype=q.dtype)


def gradients(
    case: PrefillCase, grad_out: Tensor, *, deterministic: bool = False, **options: Any
) -> Gradients:
    q, k, v, *ends = case
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with deterministic_algorithms(deterministic):
        out, _ = ops.mla_prefill(*leaves, *ends, scale=SCALE, **options)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad_out)
    return grad_q, grad_k, grad_v


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_both_directions_are_exact_enough(
    use_kernels: UseKernels,
    widths: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    deterministic: bool,
    rng: torch.Generator,
) -> None:
    case = prefill_case(rng, LENGTHS, num_heads=2, num_key_heads=1, widths=widths, dtype=dtype)
    grad_out = grad_of(rng, case)
    wanted = gradients(case, grad_out, causal=causal)
    use_kernels(*OPS)
    actual = gradients(case, grad_out, causal=causal, deterministic=deterministic)
    assert_gradients_near(actual, case, grad_out, causal=causal)
    for got, want in zip(actual, wanted, strict=True):
        assert got.is_contiguous()
        assert_close(got, want)


@pytest.mark.parametrize("is_asked", [False, True])
def test_the_forward_pass_asks_torch_for_determinism(
    use_kernels: UseKernels, calls: Calls, is_asked: bool, rng: torch.Generator
) -> None:
    """As in the helper, torch need not be asked any more when the backward pass runs."""
    case = prefill_case(rng, ((5, 5),))
    use_kernels(*OPS)
    gradients(case, grad_of(rng, case), deterministic=is_asked)
    *_, scratch, _, _, _, deterministic, arch = calls[-1]
    assert (deterministic, arch) == (is_asked, "auto")
    assert bool(len(scratch[2])) != is_asked


def test_the_same_bits_every_time_where_they_are_asked_for(
    use_kernels: UseKernels, host_kernels: ModuleType, rng: torch.Generator
) -> None:
    case = prefill_case(rng, ((100, 130),))
    grad_out = grad_of(rng, case)
    use_kernels(*OPS)
    host_kernels.set_order(0)
    wanted = gradients(case, grad_out, deterministic=True)
    for order in (1, 2):
        host_kernels.set_order(order)
        for got, want in zip(gradients(case, grad_out, deterministic=True), wanted, strict=True):
            assert_same(got, want)


def test_views_are_read_where_they_lie(use_kernels: UseKernels, calls: Calls, rng: torch.Generator) -> None:
    q, k, v, ends_q, ends_k = case = prefill_case(rng, ((40, 50),), num_heads=2)
    grad_out = grad_of(rng, case)
    use_kernels(*OPS)
    wanted = gradients(case, grad_out, deterministic=True)
    views = (apart(q), apart(k), apart(v), ends_q, ends_k)
    grad_view = apart(grad_out)
    actual = gradients(views, grad_view, deterministic=True)
    for got, want in zip(actual, wanted, strict=True):
        assert_same(got, want)
    given = calls[-1]
    assert given[0].data_ptr() == grad_view.data_ptr()
    assert [x.data_ptr() for x in given[1][:3]] == [x.data_ptr() for x in views[:3]]


def test_other_inputs_are_copied(use_kernels: UseKernels, rng: torch.Generator) -> None:
    q, k, v, ends_q, ends_k = case = prefill_case(rng, ((40, 50),), num_heads=2)
    grad_out = grad_of(rng, case)
    use_kernels(*OPS)
    wanted = gradients(case, grad_out, deterministic=True)
    ends = with_strides(ends_q), with_strides(ends_k)
    strange = (with_strides(q), with_strides(k), with_strides(v), *ends)
    for given in (with_strides(grad_out), grad_out):
        for got, want in zip(gradients(strange, given, deterministic=True), wanted, strict=True):
            assert_same(got, want)


def test_a_gradient_that_is_one_number_everywhere_is_taken(
    use_kernels: UseKernels, rng: torch.Generator
) -> None:
    """That of a sum has strides 0."""
    case = prefill_case(rng, ((20, 20),))
    ones = torch.ones_like(grad_of(rng, case))
    use_kernels(*OPS)
    wanted = gradients(case, ones, deterministic=True)
    for got, want in zip(
        gradients(case, ones[:1, :1, :1].expand_as(ones), deterministic=True), wanted, strict=True
    ):
        assert_same(got, want)


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((0, 4),), ((4, 0),), ((0, 0), (3, 0), (0, 2))], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_to_do(
    use_kernels: UseKernels, lengths: Lengths, deterministic: bool, rng: torch.Generator
) -> None:
    case = prefill_case(rng, lengths)
    use_kernels(*OPS)
    for grad, x in zip(gradients(case, grad_of(rng, case), deterministic=deterministic), case, strict=False):
        assert_same(grad, torch.zeros_like(x))


def test_what_kernels_cannot_do_runs_the_reference(
    use_kernels: UseKernels, calls: Calls, rng: torch.Generator
) -> None:
    halves = prefill_case(rng, ((9, 12), (3, 3)))
    cases = [
        prefill_case(rng, ((9, 12), (3, 3)), dtype=torch.float32),
        prefill_case(rng, ((9, 12), (3, 3)), widths=(64, 32)),
    ]
    pairs = [(case, grad_of(rng, case)) for case in cases]
    wanted = [gradients(case, grad_out) for case, grad_out in pairs]
    use_kernels(*OPS)
    for (case, grad_out), want in zip(pairs, wanted, strict=True):
        for got, expected in zip(gradients(case, grad_out), want, strict=True):
            assert_same(got, expected)
    gradients(halves, grad_of(rng, halves), arch="reference")
    assert calls == []


def test_a_second_derivative_is_refused(use_kernels: UseKernels, rng: torch.Generator) -> None:
    q, k, v, *ends = prefill_case(rng, ((5, 5),))
    leaf = q.requires_grad_()
    use_kernels(*OPS)
    out, _ = ops.mla_prefill(leaf, k, v, *ends, scale=SCALE)
    with pytest.raises(RuntimeError, match="mla_prefill: the gradient must not be differentiated again"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("lengths", [((5, 9), (3, 2)), ((0, 0),)], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_it_is_a_proper_op(
    use_kernels: UseKernels, lengths: Lengths, deterministic: bool, rng: torch.Generator
) -> None:
    q, k, v, *ends = case = prefill_case(rng, lengths, num_heads=2, num_key_heads=1)
    use_kernels(*OPS)
    outputs = torch.ops.dscoder.mla_prefill.default(*case, SCALE, True, deterministic, "auto")
    args = (grad_of(rng, case), [q, k, v, *outputs], *ends, SCALE, True, deterministic, "auto")
    assert_op_registered(torch.ops.dscoder.mla_prefill_backward.default, args)


def test_it_compiles_whole(use_kernels: UseKernels, rng: torch.Generator) -> None:
    q, k, v, *ends = case = prefill_case(rng, ((5, 9), (30, 30)))
    grad_out = grad_of(rng, case)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.mla_prefill(q * 2, k, v, *ends, scale=SCALE)[0]

    use_kernels(*OPS)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with deterministic_algorithms(True):
        outs = attend(*leaves), compiled(*leaves)
    wanted, actual = (torch.autograd.grad(out, leaves, grad_out) for out in outs)
    for got, want in zip(actual, wanted, strict=True):
        assert_same(got, want)
