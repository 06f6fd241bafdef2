"""What ranks of a test run through `ops.ExpertParallel`: one layer of experts, spread or not.

Every rank draws the whole problem and takes its part, so what ranks return can be laid side by side and
compared with one process that does it all.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from dscoder import ops
from dscoder.ops import expert_parallel, roll_call
from dscoder.ops.collective_transport import CollectiveTransport
from dscoder.ops.exchange_transport import Choices, Gathered, Routes, Spread

TIMEOUT = 20.0  # seconds; a mistake in a test ends with an error, not with the suite

Landed = TypeVar("Landed")
Arrays = dict[str, Any]  # numpy arrays by name: tensors do not outlive the process that sent them


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCase:
    """An expert layer over some ranks' tokens, with random inputs by a fixed seed."""

    tokens: tuple[int, ...]  # of each rank
    routing: str = "any"  # any, dropped, one_expert, one_rank, none
    num_experts: int = 8
    num_topk: int = 3
    hidden: int = 6
    expert_width: int = 4
    dtype: torch.dtype = torch.float32
    exact: bool = True
    max_tokens: int = 9

    def __str__(self) -> str:
        way = "exact" if self.exact else "worst"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{'+'.join(str(count) for count in self.tokens)}-{self.routing}-{dtype}-{way}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertProblem:
    """Inputs of a case: all ranks' tokens, all experts."""

    x_TD: Tensor
    idx_TK: Tensor
    weight_TK: Tensor
    gate_up_EFD: Tensor
    down_EDF: Tensor
    grad_TD: Tensor  # of the result

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are asked of."""
        return self.x_TD, self.weight_TK, self.gate_up_EFD, self.down_EDF


def problem_of(case: ExpertCase) -> ExpertProblem:
    """The inputs, the same wherever they are drawn."""
    rng = torch.Generator().manual_seed(7)
    num_tokens, num_experts, width = sum(case.tokens), case.num_experts, case.hidden

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(case.dtype)

    return ExpertProblem(
        x_TD=randn(num_tokens, width),
        idx_TK=_choices(case, rng),
        weight_TK=torch.rand(num_tokens, case.num_topk, generator=rng),
        gate_up_EFD=randn(num_experts, 2 * case.expert_width, width),
        down_EDF=randn(num_experts, width, case.expert_width),
        grad_TD=randn(num_tokens, width),
    )


def _choices(case: ExpertCase, rng: torch.Generator) -> Tensor:
    num_tokens, num_topk, num_experts = sum(case.tokens), case.num_topk, case.num_experts
    scores = torch.rand(num_tokens, num_experts, generator=rng)
    idx_TK = scores.topk(num_topk).indices.int()
    match case.routing:
        case "dropped":
            is_dropped_TK = torch.rand(num_tokens, num_topk, generator=rng) < 0.4
            wild = torch.tensor([-1, num_experts, -(2**31), 2**31 - 1], dtype=torch.int32)
            outside = wild[torch.randint(0, 4, idx_TK.shape, generator=rng)]
            return torch.where(is_dropped_TK, outside, idx_TK)
        case "one_expert":
            return torch.full_like(idx_TK, -1).index_fill_(1, torch.tensor([1]), num_experts - 1)
        case "one_rank":  # all choices with the last rank
            num_local = num_experts // len(case.tokens)
            return idx_TK % num_local + (num_experts - num_local)
        case "none":
            return torch.full_like(idx_TK, -1)
    return idx_TK


def whole_layer(case: ExpertCase) -> Arrays:
    """Result and gradients of the layer in one process."""
    inputs = _leaves(problem_of(case), slice(None), slice(None))
    handle = ops.moe_permute_maps(inputs.idx_TK, num_experts=case.num_experts)
    y_MD = ops.moe_experts(inputs.x_TD, inputs.gate_up_EFD, inputs.down_EDF, handle)
    return _results(ops.moe_unpermute(y_MD, inputs.weight_TK, handle), inputs)


def rank_layers(cases: tuple[ExpertCase, ...]) -> dict[str, tuple[Arrays, Arrays]]:
    """This rank's part of each case's layer, by dispatch and combine and by starts and waits."""
    found = {}
    with rank_group() as process_group:
        for case in cases:
            found[str(case)] = (
                _rank_layer(case, process_group, short_layer),
                _rank_layer(case, process_group, split_layer),
            )
    return found


def _rank_layer(case: ExpertCase, process_group: ProcessGroup, layer: Callable[..., Tensor]) -> Arrays:
    group = group_of(case, process_group)
    inputs = rank_inputs(case, group.rank)
    out_TD = layer(group, inputs.x_TD, inputs.idx_TK, inputs.weight_TK, inputs.gate_up_EFD, inputs.down_EDF)
    group.close()
    return _results(out_TD, inputs)


def rank_inputs(case: ExpertCase, rank: int) -> ExpertProblem:
    """A rank's tokens and experts, as leaves."""
    begin = sum(case.tokens[:rank])
    num_local = case.num_experts // len(case.tokens)
    experts = slice(rank * num_local, (rank + 1) * num_local)
    return _leaves(problem_of(case), slice(begin, begin + case.tokens[rank]), experts)


def joined(parts: list[Arrays]) -> Arrays:
    """Ranks' parts side by side."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def short_layer(
    group: ops.ExpertParallel, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The layer by dispatch and combine."""
    x_MD, offsets_E, handle = group.dispatch(x_TD, idx_TK, weight_TK)
    return group.combine(ops.moe_experts(x_MD, gate_up, down, offsets_E), handle)


def split_layer(
    group: ops.ExpertParallel, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The layer by starts and waits, without a copy of the rows in expert order."""
    x_SD, handle = group.start_dispatch(x_TD, idx_TK, weight_TK).wait()
    y_MD = ops.moe_experts(x_SD, gate_up, down, handle.maps)
    y_SD = ops.moe_unpermute(y_MD, handle.weight_SK, handle.maps)
    return group.start_combine(y_SD, handle).wait()


def group_of(case: ExpertCase, process_group: ProcessGroup, **options: Any) -> ops.ExpertParallel:
    """The exchange of this case."""
    return ops.ExpertParallel(
        process_group,
        num_experts=case.num_experts,
        hidden=case.hidden,
        max_tokens=case.max_tokens,
        num_topk=case.num_topk,
        dtype=case.dtype,
        options=ops.ExchangeOptions(**{"timeout": TIMEOUT, "exact": case.exact, **options}),
    )


@contextmanager
def rank_group() -> Iterator[ProcessGroup]:
    """The gloo group of these ranks, which torchrun's variables name."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None, "the default group was just made"
    try:
        yield group
    finally:
        dist.destroy_process_group()


def _leaves(problem: ExpertProblem, tokens: slice, experts: slice) -> ExpertProblem:
    def leaf(part: Tensor) -> Tensor:
        return part.clone().requires_grad_()

    return ExpertProblem(
        x_TD=leaf(problem.x_TD[tokens]),
        idx_TK=problem.idx_TK[tokens],
        weight_TK=leaf(problem.weight_TK[tokens]),
        gate_up_EFD=leaf(problem.gate_up_EFD[experts]),
        down_EDF=leaf(problem.down_EDF[experts]),
        grad_TD=problem.grad_TD[tokens],
    )


def _results(out_TD: Tensor, inputs: ExpertProblem) -> Arrays:
    grads = torch.autograd.grad(out_TD, inputs.leaves(), inputs.grad_TD)
    return named_results(out_TD, grads)


def named_results(out_TD: Tensor, grads: Sequence[Tensor]) -> Arrays:
    """A rank's result and the gradients of its leaves."""
    named = dict(zip(("out", "x", "weight", "gate_up", "down"), (out_TD, *grads), strict=True))
    return {name: tensor.detach().double().numpy() for name, tensor in named.items()}


def error_of(function: Callable[[], Any]) -> str:
    """The type and text of what the function raises; empty where it returns."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- what single claims run on each rank ----


def rank_slots(case: ExpertCase, idx: list[list[list[int]]]) -> Arrays:
    """Dispatch of given choices; token t of rank r is the row of 10 r + t."""
    with rank_group() as process_group:
        rank = process_group.rank()
        group = group_of(case, process_group)
        idx_TK = torch.tensor(idx[rank], dtype=torch.int32)
        token = 10 * rank + torch.arange(len(idx_TK), dtype=case.dtype)
        weight_TK = token[:, None] + 0.25 * torch.arange(case.num_topk)
        x_TD = token[:, None].expand(-1, case.hidden)
        x_SD, handle = group.start_dispatch(x_TD, idx_TK, weight_TK).wait()
        out_TD = group.start_combine(x_SD, handle).wait()
        found = {
            **{"x": x_SD[:, 0], "idx": handle.idx_SK, "weight": handle.weight_SK, "out": out_TD[:, 0]},
            **{"slot": handle.slot_TR, "counts": handle.counts_R, "offsets": handle.maps.offsets_E},
        }
        statistics = asdict(group.statistics())
        return {name: tensor.tolist() for name, tensor in found.items()} | {"statistics": statistics}


class _Noted(torch.autograd.Function):
    """x, and a line in the log whenever it passes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, log: list[str]) -> Tensor:
        ctx.name, ctx.log = name, log
        log.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.log.append(f"{ctx.name} gradient")
        return grad, None, None


_noted: Any = _Noted.apply


class LoggedTransport(CollectiveTransport):
    """A transport that tells when movements start and land."""

    log: ClassVar[list[str]] = []

    def start_spread(self, routes: Routes, x_TD: Tensor, choices: Choices | None) -> Callable[[], Spread]:
        """Tells."""
        return self._told("spread", super().start_spread(routes, x_TD, choices))

    def start_gather(
        self, routes: Routes, y_SD: Tensor | None, weight_SK: Tensor | None
    ) -> Callable[[], Gathered]:
        """Tells, and what is sent."""
        sent = [name for name, part in (("rows", y_SD), ("weights", weight_SK)) if part is not None]
        return self._told(f"gather {' and '.join(sent)}", super().start_gather(routes, y_SD, weight_SK))

    def _told(self, name: str, land: Callable[[], Landed]) -> Callable[[], Landed]:
        self.log.append(f"start {name}")

        def told_land() -> Landed:
            self.log.append(f"land {name}")
            return land()

        return told_land


def logged_group(case: ExpertCase, process_group: ProcessGroup) -> ops.ExpertParallel:
    """An exchange of which every movement is in LoggedTransport.log."""
    with mock.patch.object(expert_parallel, "CollectiveTransport", LoggedTransport):
        return group_of(case, process_group)


def rank_order(case: ExpertCase) -> list[str]:
    """The order of events where other work lies between the starts and their waits."""
    with rank_group() as process_group:
        group = logged_group(case, process_group)
        log, inputs = LoggedTransport.log, rank_inputs(case, group.rank)
        departing = group.start_dispatch(inputs.x_TD, inputs.idx_TK, inputs.weight_TK)
        shared_TD = _noted(inputs.x_TD, "shared", log)
        x_SD, handle = departing.wait()
        y_MD = ops.moe_experts(x_SD, inputs.gate_up_EFD, inputs.down_EDF, handle.maps)
        y_MD = _noted(y_MD, "experts", log)
        returning = group.start_combine(ops.moe_unpermute(y_MD, handle.weight_SK, handle.maps), handle)
        more_TD = _noted(inputs.x_TD, "more", log)
        out_TD = returning.wait() + shared_TD + more_TD
        torch.autograd.backward(out_TD, inputs.grad_TD)
        return log


def rank_checkpoint(case: ExpertCase) -> tuple[bool, list[str], list[str]]:
    """Whether a recomputed layer has the gradients of a kept one, bit for bit, and the movements of both."""
    with rank_group() as process_group:
        group = logged_group(case, process_group)
        log = LoggedTransport.log
        inputs = rank_inputs(case, group.rank)
        leaves = inputs.leaves()
        found, logs = [], []
        for recomputes in (False, True):
            args = (inputs.x_TD, inputs.idx_TK, *leaves[1:])
            layer = partial(split_layer, group)
            out_TD = checkpoint(layer, *args, use_reentrant=False) if recomputes else layer(*args)
            found.append((out_TD, *torch.autograd.grad(out_TD, leaves, inputs.grad_TD)))
            logs.append([line for line in log if line.startswith("start")])
            log.clear()
        return all(torch.equal(one, other) for one, other in zip(*found, strict=True)), logs[0], logs[1]


def rank_partial(case: ExpertCase, wanted: tuple[str, ...]) -> tuple[Arrays, list[str]]:
    """The gradients of some inputs alone, and the movements."""
    with rank_group() as process_group:
        group = logged_group(case, process_group)
        inputs = rank_inputs(case, group.rank)
        leaves = {"x": inputs.x_TD, "weight": inputs.weight_TK}
        leaves |= {"gate_up": inputs.gate_up_EFD, "down": inputs.down_EDF}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        out_TD = split_layer(group, leaves["x"], inputs.idx_TK, *list(leaves.values())[1:])
        if wanted:
            torch.autograd.backward(out_TD, inputs.grad_TD)
        grads = {name: leaf.grad.double().numpy() for name, leaf in leaves.items() if leaf.grad is not None}
        return grads, [line for line in LoggedTransport.log if line.startswith("start")]


def rank_second_derivative(case: ExpertCase) -> str:
    """The error of differentiating a gradient of dispatch again."""
    with rank_group() as process_group:
        group = group_of(case, process_group)
        inputs = rank_inputs(case, group.rank)
        x_SD, _ = group.start_dispatch(inputs.x_TD, inputs.idx_TK, inputs.weight_TK).wait()
        return error_of(lambda: torch.autograd.grad(x_SD.sum(), inputs.x_TD, create_graph=True))


def rank_mismatch(case: ExpertCase, changed: dict[str, Any]) -> str:
    """The error where rank 1 alone builds another exchange."""
    with rank_group() as process_group:
        own = replace(case, **changed) if process_group.rank() == 1 else case
        return error_of(lambda: group_of(own, process_group))


def rank_lost(case: ExpertCase, lost: int) -> list[str]:
    """One rank dies after a good exchange: what the others' next one says, and what they say later."""
    with rank_group() as process_group:
        group = group_of(case, process_group)
        inputs = rank_inputs(case, group.rank)
        args = (inputs.x_TD, inputs.idx_TK, inputs.weight_TK)
        group.dispatch(*args)
        if process_group.rank() == lost:
            os._exit(3)
        return [error_of(lambda: group.dispatch(*args)), error_of(group.check)]


def rank_late(case: ExpertCase, absent: str) -> str:
    """The error of rank 0 while rank 1 does not come: to the construction or to a dispatch."""
    roll_call.PATIENCE = 0.5
    with rank_group() as process_group:
        store = process_group.get_group_store()
        if process_group.rank() == 1:
            if absent == "dispatch":
                group_of(case, process_group, timeout=1.0)
            store.wait(["done"], timedelta(seconds=TIMEOUT))
            return ""

        def come() -> None:
            group = group_of(case, process_group, timeout=1.0)
            inputs = rank_inputs(case, group.rank)
            group.dispatch(inputs.x_TD, inputs.idx_TK, inputs.weight_TK)

        error = error_of(come)
        store.set("done", "")
        return error
