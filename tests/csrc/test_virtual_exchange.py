"""The checks of tests/gpu/test_expert_parallel.py, on the host executor."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dscoder.runtime import native
from dscoder.testing import gpu
from dscoder.testing.virtual_exchange import (
    HOW,
    ExchangeCase,
    check_absence,
    check_epochs,
    check_repeats,
)

CPU = "cpu"
FOR_A_GPU = runpy.run_path(str(Path(__file__).parents[1] / "gpu" / "test_expert_parallel.py"))
SMALL = ExchangeCase(num_ranks=2, max_tokens=5, width=8, num_topk=2)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("is_exact", [True, False])
def test_exchanges_are_the_reference(
    host_ops: ModuleType, host_kernels: ModuleType, how: str, is_exact: bool
) -> None:
    host_kernels.set_order(3)
    check_epochs(host_ops, ExchangeCase(how=how, is_exact=is_exact), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(host_ops: ModuleType, host_kernels: ModuleType, dtype: torch.dtype) -> None:
    host_kernels.set_order(4)
    check_epochs(host_ops, ExchangeCase(dtype=dtype, copy="bulk"), CPU)


@pytest.mark.parametrize("how", HOW)
def test_dispatches_in_a_row(host_ops: ModuleType, host_kernels: ModuleType, how: str) -> None:
    host_kernels.set_order(5)
    check_repeats(host_ops, ExchangeCase(how=how), CPU)


@pytest.mark.parametrize("missing", [0, 2])
def test_an_absent_rank_is_named(host_ops: ModuleType, host_kernels: ModuleType, missing: int) -> None:
    host_kernels.set_order(missing)
    check_absence(host_ops, ExchangeCase(timeout=1e-3), CPU, missing=missing)


def test_a_wrong_result_is_seen(host_ops: ModuleType, host_kernels: ModuleType) -> None:
    """A rank that reads its experts' numbers otherwise."""
    host_kernels.set_order(6)
    case = ExchangeCase()
    ranks = case.ranks(host_ops)

    class Other:
        def __getattr__(self, name: str) -> object:
            return getattr(host_ops, name)

        def dispatch_receive(self, *args: object) -> None:
            host_ops.dispatch_receive(*args[:-1], replace(case, num_local_experts=1).num_local_experts)

    ranks.native = Other()
    with pytest.raises(AssertionError):
        check_epochs(Other(), case, CPU)  # type: ignore[arg-type]


@pytest.fixture
def on_host(host_ops: ModuleType, host_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU tests' own checks find the host executor where a GPU would be; a graph is a call."""
    host_kernels.set_order(7)
    monkeypatch.setattr(native, "_C", host_ops)
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    monkeypatch.setattr(gpu, "poison_free_memory", lambda: None)
    monkeypatch.setattr(gpu, "assert_never_waits", lambda step: step())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("check", "args"), [("epochs", (2,)), ("repeats", ()), ("replays", ()), ("same_bits", ()), ("quiet", ())]
)
def test_the_checks_for_a_gpu_run_here(on_host: None, check: str, args: tuple[int, ...], how: str) -> None:
    FOR_A_GPU[check](check, replace(SMALL, how=how), *args)


def test_the_check_of_absence_runs_here(on_host: None) -> None:
    FOR_A_GPU["absence"]("absence", replace(SMALL, timeout=1e-3), 1)
