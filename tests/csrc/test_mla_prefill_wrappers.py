"""The Python side of the kernels of mla_prefill, the host executor in place of a GPU."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dscoder import ops
from dscoder.testing.cases import generator
from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.poison import with_strides
from dscoder.testing.prefill import SCALE, WIDTHS, PrefillCase, apart, assert_prefills, prefill_case

UseKernels = Callable[..., None]
Calls = list[tuple[Any, ...]]

LENGTHS = [(70, 70), (0, 3), (33, 97), (9, 4)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return generator(request.node.nodeid)


@pytest.fixture
def calls(host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The arguments of each launch."""
    seen: Calls = []
    binding = host_ops.mla_prefill_forward

    def run(*args: Any) -> None:
        seen.append(args)
        binding(*args)

    monkeypatch.setattr(host_ops, "mla_prefill_forward", run)
    return seen


def attend(case: PrefillCase, *, causal: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prefill(*case, scale=SCALE, causal=causal, **options)


def with_arch(case: PrefillCase, arch: str, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """The op itself, whose public function lets no CPU tensor ask for kernels."""
    out, lse = torch.ops.dscoder.mla_prefill.default(*case, scale, True, False, arch)
    return out, lse


def assert_agree(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_agree_with_the_reference(
    use_kernels: UseKernels,
    dtype: torch.dtype,
    widths: tuple[int, int],
    num_key_heads: int,
    causal: bool,
    rng: torch.Generator,
) -> None:
    case = prefill_case(rng, LENGTHS, num_heads=4, num_key_heads=num_key_heads, widths=widths, dtype=dtype)
    wanted = attend(case, causal=causal)
    use_kernels("mla_prefill")
    assert_agree(attend(case, causal=causal), wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_are_exact_enough(use_kernels: UseKernels, dtype: torch.dtype, rng: torch.Generator) -> None:
    """As on a GPU: sequence by sequence, held to torch's own error in the same dtype."""
    case = prefill_case(rng, [(150, 150), (1, 200), (65, 65)], dtype=dtype)
    use_kernels("mla_prefill")
    assert_prefills(attend(case), case, causal=True)


def test_views_are_read_where_they_lie(use_kernels: UseKernels, calls: Calls, rng: torch.Generator) -> None:
    """As the model has them: values are columns of what keys come from."""
    q, k, v, *ends = prefill_case(rng, LENGTHS)
    views = (apart(q), apart(k), apart(v))
    wanted = attend((q, k, v, *ends))
    use_kernels("mla_prefill")
    assert_agree(attend((*views, *ends)), wanted)
    assert [x.data_ptr() for x in calls[-1][:3]] == [x.data_ptr() for x in views]


def test_other_inputs_are_copied(use_kernels: UseKernels, calls: Calls, rng: torch.Generator) -> None:
    q, k, v, *ends = case = prefill_case(rng, LENGTHS)
    wanted = attend(case)
    use_kernels("mla_prefill")
    strange = tuple(with_strides(x) for x in (q, k, v))
    assert_agree(attend((*strange, *(with_strides(x) for x in ends))), wanted)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert_agree(attend((shifted, k, v, *ends)), wanted)
    assert len(calls) == 2


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 5), (0, 0)], [(4, 0)]])
def test_nothing_to_do(use_kernels: UseKernels, lengths: list[tuple[int, int]], rng: torch.Generator) -> None:
    case = prefill_case(rng, lengths)
    wanted = attend(case)
    use_kernels("mla_prefill")
    for got, want in zip(attend(case), wanted, strict=True):
        assert_same(got, want)


def test_no_heads_are_no_work(use_kernels: UseKernels, rng: torch.Generator) -> None:
    q, k, v, *ends = prefill_case(rng, [(5, 5)])
    use_kernels("mla_prefill")
    assert attend((q[:, :0], k[:, :0], v[:, :0], *ends))[0].shape == (5, 0, 128)


def test_what_kernels_cannot_do_runs_the_reference(
    use_kernels: UseKernels, calls: Calls, rng: torch.Generator
) -> None:
    case = prefill_case(rng, LENGTHS)
    others = [
        prefill_case(rng, LENGTHS, dtype=torch.float32),
        prefill_case(rng, LENGTHS, widths=(48, 32)),
        prefill_case(rng, LENGTHS, widths=(192, 192)),
    ]
    wanted = [attend(each) for each in others]
    unscaled = ops.mla_prefill(*case, scale=0.0)
    use_kernels("mla_prefill")
    for each, want in zip(others, wanted, strict=True):
        for got, expected in zip(attend(each), want, strict=True):
            assert_same(got, expected)
    for got, expected in zip(ops.mla_prefill(*case, scale=0.0), unscaled, strict=True):
        assert_same(got, expected)
    assert attend(case, arch="reference")[0].isfinite().all()
    assert calls == []


def test_kernels_that_were_asked_for_and_cannot_say_why(
    use_kernels: UseKernels, rng: torch.Generator
) -> None:
    case = prefill_case(rng, LENGTHS)
    use_kernels("mla_prefill")
    for changed, scale, message in (
        (prefill_case(rng, LENGTHS, dtype=torch.float32), SCALE, "q of bfloat16 or float16, got float32"),
        (
            prefill_case(rng, LENGTHS, widths=(192, 192)),
            SCALE,
            r"widths of k and v to be \(192, 128\) or \(128, 128\), got \(192, 192\)",
        ),
        (case, -1.0, "scale > 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^mla_prefill: arch sm80 wants {message}$"):
            with_arch(changed, "sm80", scale)


def test_the_arch_is_what_was_asked_for(use_kernels: UseKernels, calls: Calls, rng: torch.Generator) -> None:
    case = prefill_case(rng, LENGTHS)
    wanted = attend(case)
    use_kernels("mla_prefill")
    assert_agree(with_arch(case, "sm80"), wanted)
    assert calls[-1][-1] == "sm80"
    with pytest.raises(ValueError, match=r"^mla_prefill: arch sm90 needs compute capability 9.0"):
        with_arch(case, "sm90")


def test_a_gradient_of_the_kernels_output_is_the_references(
    use_kernels: UseKernels, rng: torch.Generator
) -> None:
    """The backward pass runs the reference on what the kernels have kept."""
    q, k, v, *ends = prefill_case(rng, LENGTHS)
    grads = []
    for is_kernel in (False, True):
        if is_kernel:
            use_kernels("mla_prefill")
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = attend((*inputs, *ends))
        grads.append(torch.autograd.grad(out.float().square().sum(), inputs))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert_close(got, want)


def test_the_kernels_are_what_ran(
    use_kernels: UseKernels, host_ops: ModuleType, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """The tests above compare something: with the binding gone, the way to it is an error."""
    case = prefill_case(rng, [(5, 5)])
    monkeypatch.delattr(host_ops, "mla_prefill_forward")
    use_kernels("mla_prefill")
    with pytest.raises(AttributeError, match="mla_prefill_forward"):
        attend(case)
