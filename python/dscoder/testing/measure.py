"""One op beside its peers in one run: same inputs, results compared, times taken in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.peer import Peer, Run, UnsupportedError
from dscoder.testing.results import Case, Timing, record
from dscoder.testing.timing import Clock, Runner, interleaved_medians

Contender = Callable[..., Any] | Peer

NUM_WALL_ROUNDS = 3
MAX_ERROR_LENGTH = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What every contender is called with.

    In a step with a backward pass the first `num_leaves` arguments take gradients, and `grads` are the
    gradients of the results that have some, in order. `shared` is what the contenders touch besides: a
    model's weights, of which there is no second copy.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_leaves: int = 0
    grads: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()

    def copy(self) -> "Problem":
        """The same values in memory of their own."""
        return replace(self, args=_copied(self.args), grads=_copied(self.grads))

    def tensors(self) -> list[Tensor]:
        """All that a call touches, save its results."""
        return _tensors((self.args, self.grads, self.shared))


def _copied(value: Any) -> Any:
    """The value with a clone of every tensor in it, those in tuples and records (an op's handle) too."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _copied(getattr(value, item.name)) for item in fields(value)})
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    if is_dataclass(value):
        return [tensor for item in fields(value) for tensor in _tensors(getattr(value, item.name))]
    return []


def run_for(contender: Contender, problem: Problem, step: str) -> Run:
    """`contender` on `problem`, ready to be timed; of "backward" the forward pass is done here, once."""
    if "backward" not in step:
        return _bound(contender, problem.args, problem.kwargs)
    leaves = [x.detach().requires_grad_() for x in problem.args[: problem.num_leaves]]
    run = _bound(contender, (*leaves, *problem.args[problem.num_leaves :]), problem.kwargs)

    def gradients(outputs: Any, *, keep: bool) -> tuple[Tensor, ...]:
        differentiable = [y for y in _tensors(outputs) if y.requires_grad]
        return torch.autograd.grad(differentiable, leaves, problem.grads, retain_graph=keep)

    if step == "backward":
        outputs = run()
        return Run(call=lambda: gradients(outputs, keep=True))
    return Run(call=lambda: gradients(run(), keep=False))


def _bound(contender: Contender, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    if isinstance(contender, Peer):
        return contender.prepare(*args, **kwargs)
    return Run(call=lambda: contender(*args, **kwargs))


def check_results(actual: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Integers bit for bit, floats within the tolerance of `dtype`, the coarsest of the inputs."""
    actual, wanted = _tensors(actual), _tensors(wanted)
    assert len(actual) == len(wanted), f"{len(actual)} results, wanted {len(wanted)}"
    for got, want in zip(actual, wanted, strict=True):
        if not want.is_floating_point():
            assert_same(got, want)
        elif not torch.equal(got, want):
            assert_close(got, want, dtype=dtype)


def _short(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:MAX_ERROR_LENGTH]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contest:
    """One case, and the problem with copies of it in memory of their own."""

    clock: Clock
    case: Case
    problems: Sequence[Problem]

    def runs(self, contender: Contender) -> Sequence[Run]:
        """The contender on every copy."""
        return self.clock.prepare(
            lambda: [run_for(contender, problem, self.case.step) for problem in self.problems]
        )

    def runners(
        self, peers: Mapping[str, Contender], wanted: Any, *, is_strict: bool
    ) -> tuple[dict[str, Runner], dict[str, Timing]]:
        """Runners of the peers that compute what was wanted, and what is to be said of the others."""
        runners, failed = {}, {}
        for name, peer in peers.items():
            try:
                runs = self.runs(peer)
                check_results(self.clock.run(runs[0]), wanted, self.case.dtype)
                runners[name] = self.clock.runner([run.call for run in runs])
            except UnsupportedError as error:
                failed[name] = Timing(error=_short(error))
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
    ours: Contender,
    peers: Mapping[str, Contender],
) -> None:
    """Check that the peers compute what `ours` does, time all of them, store the record in `extra_info`.

    A peer that raises or computes something else is named in the record and left out; with benchmarks
    disabled, where nothing is timed, it fails the test, unless it says that it lacks the case.
    """
    first = _Contest(clock=clock, case=case, problems=[problem])
    result = clock.run(first.runs(ours)[0])
    if benchmark.disabled:
        first.runners(peers, result, is_strict=True)
        benchmark.pedantic(lambda: None)  # type: ignore[no-untyped-call]
        return
    num_bytes = sum(x.nbytes for x in [*problem.tensors(), *_tensors(result)])
    num_copies = clock.num_copies(num_bytes)
    copies = [problem, *(problem.copy() for _ in range(num_copies - 1))]
    contest = _Contest(clock=clock, case=case, problems=copies)
    ceilings = clock.ceilings(case.dtype)
    calls = [run.call for run in contest.runs(ours)]
    runner = clock.runner(calls)
    runners, failed = contest.runners(peers, result, is_strict=False)
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
            is_warm=clock.is_warm(num_bytes),
        )
    )
