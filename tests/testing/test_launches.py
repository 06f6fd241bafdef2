"""The counter of launches: what costs one, and whose it is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dscoder.testing.launches import Launch, launches_of, num_kernels, table

ROWS = torch.empty(4, 6, device="meta")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.view(2, 12).transpose(0, 1)[1:].unsqueeze(0),
        lambda x: x.flatten(),
        lambda x: x.chunk(2, dim=-1),
        lambda x: x.to(torch.float32).contiguous(),  # as it is already
        lambda x: (torch.empty_like(x), x.new_empty(3)),
        lambda x: x.detach().expand(5, -1, -1),
    ],
)
def test_views_and_unfilled_memory_cost_nothing(call: Callable[[Tensor], object]) -> None:
    assert launches_of(nn.Identity(), lambda: call(ROWS)) == []


@pytest.mark.parametrize(
    ("call", "ops"),
    [
        (lambda x: x.t().flatten(), ["aten.flatten"]),  # a copy in disguise
        (lambda x: x.to(torch.bfloat16), ["aten.to"]),
        (lambda x: x.t().contiguous(), ["aten.contiguous"]),
        (lambda x: x.add_(1), ["aten.add_"]),
        (lambda x: x.new_zeros(3), ["aten.new_zeros"]),
        (lambda x: torch.arange(3, device="meta"), ["aten.arange"]),
        (lambda x: torch.mm(x, x.t(), out=x.new_empty(4, 4)), ["aten.mm"]),
        (lambda x: nn.functional.rms_norm(x, (6,)).argmax(dim=-1), ["aten.rms_norm", "aten.argmax"]),
    ],
)
def test_what_computes_or_copies_costs_a_launch(call: Callable[[Tensor], object], ops: list[str]) -> None:
    assert [one.op for one in launches_of(nn.Identity(), lambda: call(ROWS))] == ops


def test_a_launch_belongs_to_the_innermost_module() -> None:
    model = nn.Sequential(nn.Linear(6, 6, device="meta"), nn.Sequential(nn.SiLU(), nn.Tanh()))
    launches = launches_of(model, lambda: model(ROWS).neg())
    assert [(one.module, one.op) for one in launches] == [
        ("0", "aten.linear"),
        ("1.0", "aten.silu"),
        ("1.1", "aten.tanh"),
        ("", "aten.neg"),
    ]
    assert num_kernels(launches) == 4
    assert num_kernels(launches, "1") == 2
    assert not model[0]._forward_hooks


def test_a_part_is_told_by_whole_names() -> None:
    launches = [Launch(op="aten.mm", module=name, num_kernels=2) for name in ("layers.1", "layers.10.mlp")]
    assert num_kernels(launches, "layers.1") == 2
    assert table(launches).splitlines() == ["  2  layers.1       aten.mm", "  2  layers.10.mlp  aten.mm"]
