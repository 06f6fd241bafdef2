"""The checks of tests/gpu/test_expert_parallel.py, on the host executor."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from dscoder.testing.virtual_exchange import (
    HOW,
    ExchangeCase,
    check_absence,
    check_epochs,
    check_repeats,
)

CPU = "cpu"


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
