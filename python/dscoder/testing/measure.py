"""One op beside its peers in one run: same inputs, results compared, times taken in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.results import Case, Timing, record
from dscoder.testing.timing import Call, Clock, Runner, interleaved_medians, tensor_bytes

Function = Callable[..., Any]

NUM_WALL_ROUNDS = 3
MAX_ERROR_LENGTH = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What every contender is called with.

    In a step with a backward pass the first `num_leaves` arguments take gradients, and `grads` are the
    gradients of the results that have some, in order.
    """

    args: tuple[Any, ...]
    num_leaves: int = 0
    grads: tuple[Tensor, ...] = ()

    def copy(self) -> "Problem":
        """The same values in memory of their own."""
        args = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in self.args)
        grads = tuple(grad.clone() for grad in self.grads)
        return Problem(args=args, num_leaves=self.num_leaves, grads=grads)


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The results of a call, one or several."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _gradients(outputs: Any, leaves: Sequence[Tensor], problem: Problem, *, keep: bool) -> tuple[Tensor, ...]:
    differentiable = [y for y in as_tuple(outputs) if isinstance(y, Tensor) and y.requires_grad]
    return torch.autograd.grad(differentiable, leaves, problem.grads, retain_graph=keep)


def call_for(function: Function, problem: Problem, step: str) -> Call:
    """One call of `function` on `problem`; of "backward" the forward pass is done here, once."""
    if "backward" not in step:
        return lambda: function(*problem.args)
    leaves = [x.detach().requires_grad_() for x in problem.args[: problem.num_leaves]]
    args = (*leaves, *problem.args[problem.num_leaves :])
    if step == "backward":
        outputs = function(*args)
        return lambda: _gradients(outputs, leaves, problem, keep=True)
    return lambda: _gradients(function(*args), leaves, problem, keep=False)


def check_results(actual: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Integers bit for bit, floats within the tolerance of `dtype`, the coarsest of the inputs."""
    actual, wanted = as_tuple(actual), as_tuple(wanted)
    assert len(actual) == len(wanted), f"{len(actual)} results, wanted {len(wanted)}"
    for got, want in zip(actual, wanted, strict=True):
        is_float = isinstance(want, Tensor) and want.is_floating_point()
        if not is_float:
            assert_same(got, want)
        elif not torch.equal(got, want):
            assert_close(got, want, dtype=dtype)


def _short(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:MAX_ERROR_LENGTH]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contest:
    clock: Clock
    step: str
    copies: Sequence[Problem]

    def calls(self, function: Function) -> Sequence[Call]:
        return self.clock.prepare(lambda: [call_for(function, copy, self.step) for copy in self.copies])


def _contest(clock: Clock, case: Case, problem: Problem, num_copies: int) -> _Contest:
    """The problem and copies of it, `num_copies` in all."""
    copies = [problem, *(problem.copy() for _ in range(num_copies - 1))]
    return _Contest(clock=clock, step=case.step, copies=copies)


def _enter(
    contest: _Contest, peers: Mapping[str, Function], wanted: Any, dtype: torch.dtype, *, is_strict: bool
) -> tuple[dict[str, Runner], dict[str, Timing]]:
    """Runners of the peers that compute what was wanted, and what is to be said of the others."""
    runners, failed = {}, {}
    for name, function in peers.items():
        try:
            calls = contest.calls(function)
            check_results(contest.clock.run(calls[0]), wanted, dtype)
            runners[name] = contest.clock.runner(calls)
        except Exception as error:  # whatever a peer does wrong, ours is measured
            if is_strict:
                raise
            failed[name] = Timing(error=_short(error))
    return runners, failed


def measure(
    benchmark: BenchmarkFixture,
    clock: Clock,
    case: Case,
    problem: Problem,
    ours: Function,
    peers: Mapping[str, Function],
) -> None:
    """Check that the peers compute what `ours` does, time all of them, store the record in `extra_info`.

    A peer that raises or computes something else is named in the record and left out; with benchmarks
    disabled, where nothing is timed, it fails the test.
    """
    first = _contest(clock, case, problem, 1)
    result = clock.run(first.calls(ours)[0])
    if benchmark.disabled:
        _enter(first, peers, result, case.dtype, is_strict=True)
        benchmark.pedantic(lambda: None)  # type: ignore[no-untyped-call]
        return
    touched = tensor_bytes(problem.args) + tensor_bytes(problem.grads) + tensor_bytes(as_tuple(result))
    contest = _contest(clock, case, problem, clock.num_copies(touched))
    calls = contest.calls(ours)
    ceilings = clock.ceilings()
    runner = clock.runner(calls)
    runners, failed = _enter(contest, peers, result, case.dtype, is_strict=False)
    seconds = interleaved_medians({"": runner, **runners}, clock.budget)
    timings = {
        name: failed.get(name) or Timing(seconds=seconds[name], method=runners[name].method) for name in peers
    }
    # pytest-benchmark's own statistics: wall time of calls that are waited for.
    num_rounds = NUM_WALL_ROUNDS if seconds[""] < clock.budget else 1
    benchmark.pedantic(clock.run, (calls[0],), rounds=num_rounds)  # type: ignore[no-untyped-call]
    benchmark.extra_info.update(
        record(
            case,
            device=clock.device,
            ours=Timing(seconds=seconds[""], method=runner.method),
            peers=timings,
            ceilings=ceilings,
            call_seconds=clock.call_seconds(calls),
        )
    )
