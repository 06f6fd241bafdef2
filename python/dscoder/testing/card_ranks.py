"""Processes whose ranks share one GPU, and exchange tokens over each other's memory in it.

With the transport "collective" on a CPU, the same functions run over gloo.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dscoder.ops import ExchangeError
from dscoder.testing.compare import assert_close
from dscoder.testing.expert_ranks import (
    Arrays,
    ExpertCase,
    ExpertProblem,
    group_of,
    named_results,
    rank_group,
    rank_inputs,
    split_layer,
)
from dscoder.testing.ranks import end_ranks, run_ranks
from dscoder.testing.virtual_ranks import Received

PATIENCE = 2.0  # seconds that a rank waits for one that has died
LIMIT_S = 120.0  # of all processes


def received_of(groups: Sequence[list[Tensor]]) -> Received:
    """What came, from its tensors by kind."""
    x, count, idx, weight = groups
    return Received(x=x, count=count, idx=idx, weight=weight)


def on_device(inputs: ExpertProblem, device: str) -> ExpertProblem:
    """The same leaves there."""
    names = ("x_TD", "weight_TK", "gate_up_EFD", "down_EDF")
    moved: dict[str, Any] = {
        name: getattr(inputs, name).detach().to(device).requires_grad_() for name in names
    }
    return replace(inputs, idx_TK=inputs.idx_TK.to(device), grad_TD=inputs.grad_TD.to(device), **moved)


def rank_layers_on(cases: tuple[ExpertCase, ...], device: str, transport: str) -> list[tuple[str, Arrays]]:
    """This rank's part of every case's layer, and the transport it went by."""
    found = []
    with rank_group() as process_group:
        for case in cases:
            group = group_of(case, process_group, device=torch.device(device), transport=transport)
            inputs = on_device(rank_inputs(case, group.rank), device)
            out_TD = split_layer(
                group, inputs.x_TD, inputs.idx_TK, inputs.weight_TK, inputs.gate_up_EFD, inputs.down_EDF
            )
            grads = torch.autograd.grad(out_TD, inputs.leaves(), inputs.grad_TD)
            group.check()
            found.append((group.transport, named_results(out_TD.cpu(), [grad.cpu() for grad in grads])))
            group.close()
    return found


def check_layers(cases: tuple[ExpertCase, ...], *, device: str, transport: str) -> None:
    """Values and gradients of every rank are those of the same ranks over gloo on the CPU."""
    num_ranks = len(cases[0].tokens)
    actual = run_ranks(rank_layers_on, cases, device, transport, num_ranks=num_ranks, limit=LIMIT_S)
    wanted = run_ranks(rank_layers_on, cases, "cpu", "collective", num_ranks=num_ranks, limit=LIMIT_S)
    for got, want in zip(actual, wanted, strict=True):
        for case, (name, arrays), (_, references) in zip(cases, got, want, strict=True):
            assert name == transport
            for part, reference in references.items():
                actual_part, wanted_part = torch.from_numpy(arrays[part]), torch.from_numpy(reference)
                assert_close(actual_part, wanted_part, dtype=case.dtype)


def rank_lost_on(case: ExpertCase, device: str, transport: str) -> str:
    """The last rank dies after a good exchange: what the others come to know."""
    with rank_group() as process_group:
        group = group_of(
            case, process_group, device=torch.device(device), transport=transport, timeout=PATIENCE
        )
        inputs = on_device(rank_inputs(case, group.rank), device)
        args = (inputs.x_TD, inputs.idx_TK, inputs.weight_TK)
        x_SD, _ = group.start_dispatch(*args).wait()
        x_SD.cpu()  # it is over
        if group.rank == group.num_ranks - 1:
            os._exit(3)
        deadline = time.monotonic() + 10 * PATIENCE
        try:
            while time.monotonic() < deadline:
                group.start_dispatch(*args).wait()
                group.check()
        except ExchangeError as error:
            return str(error)
        return ""


def check_lost(case: ExpertCase, *, device: str, transport: str) -> None:
    """All ranks but the one that died end with an error that names it."""
    num_ranks = len(case.tokens)
    *others, lost = end_ranks(rank_lost_on, case, device, transport, num_ranks=num_ranks, limit=LIMIT_S)
    assert lost.status == 3
    for end in others:
        assert f"rank {num_ranks - 1}" in (end.value or ""), end
