"""The engine on a clock that tells made-up times: what is compared, what is timed, what is stored."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dscoder.ops import PermuteHandle
from dscoder.testing.cases import generator, randn
from dscoder.testing.measure import Problem, check_results, measure, run_for
from dscoder.testing.peer import Peer, Run, UnsupportedError
from dscoder.testing.results import Case
from dscoder.testing.timing import Call, Ceilings, Runner

CASE = Case(
    op="double",
    step="forward",
    model="v2",
    routing="uniform",
    shape="T=8",
    dtype=torch.float32,
    flops=4e6,
    num_bytes=8e6,
)
FORWARD = {"op": "double", "step": "forward", "model": "v2", "routing": "uniform", "shape": "T=8"}


class MadeUpClock:
    """A call takes a millisecond; one that calls `slowly` takes three. 4 GFLOP/s and 16 GB/s."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.budget = 0.001
        self.elapsed = 0.0
        self.num_prepared: list[int] = []

    def slowly(self) -> None:
        self.elapsed += 0.002

    def num_copies(self, num_bytes: int) -> int:
        self.num_bytes = num_bytes
        return 3

    def prepare(self, make: Callable[[], Any]) -> Any:
        made = make()
        self.num_prepared.append(len(made))
        return made

    def run(self, call: Call) -> Any:
        return call()

    def runner(self, calls: Sequence[Call]) -> Runner:
        def seconds() -> float:
            self.elapsed = 0.001
            calls[0]()
            return self.elapsed

        return Runner(method="graph", seconds=seconds)

    def call_seconds(self, calls: Sequence[Call]) -> float | None:
        return 0.005

    def is_warm(self, num_bytes: int) -> bool:
        return False

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        return Ceilings(flops_per_second=8e9, bytes_per_second=16e9)


@pytest.fixture
def clock() -> MadeUpClock:
    return MadeUpClock()


@pytest.fixture
def enabled(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> BenchmarkFixture:
    """A benchmark that times although the tests run with benchmarks disabled; its statistics go nowhere."""
    monkeypatch.setattr(benchmark, "disabled", False)
    monkeypatch.setattr(benchmark, "_add_stats", lambda _: None)
    yield benchmark
    benchmark.extra_info.clear()


@pytest.fixture
def x(request: pytest.FixtureRequest) -> Tensor:
    return randn(generator(request.node.nodeid), 8)


def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_record_holds_time_rates_share_and_ratios(
    enabled: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    def slow(x: Tensor) -> Tensor:
        clock.slowly()
        return x + x

    measure(enabled, clock, CASE, Problem(args=(x,)), double, {"slow": slow})
    kept = enabled.extra_info
    assert {name: kept[name] for name in FORWARD} == FORWARD
    assert (kept["dtype"], kept["method"], kept["us"], kept["call_us"]) == (
        "float32",
        "graph",
        1000.0,
        5000.0,
    )
    assert (kept["TFLOP/s"], kept["GB/s"]) == (0.004, 8.0)
    # Two peaks: 4e6 of 8e9 a second is 0.5 ms, 8e6 of 16e9 a second is 0.5 ms.
    assert (kept["share"], kept["ceiling_TFLOP/s"], kept["ceiling_GB/s"]) == (50.0, 0.008, 16.0)
    assert kept["has_kernel"] is False
    assert kept["peers"] == {"slow": {"us": 3000.0, "ratio": 3.0}}


def test_every_contender_runs_on_every_copy(enabled: BenchmarkFixture, clock: MadeUpClock, x: Tensor) -> None:
    seen = set()

    def peer(x: Tensor) -> Run:
        seen.add(x.data_ptr())
        return Run(call=lambda: x * 2)

    measure(enabled, clock, CASE, Problem(args=(x,)), double, {"peer": Peer(prepare=peer)})
    assert len(seen) == 3
    assert clock.num_bytes == x.nbytes * 2  # the input and the result
    assert clock.num_prepared == [1, 3, 3]


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (lambda x: x / 0 + 1 / 0, "ZeroDivisionError: "),
        (lambda x: x * 2.1, "AssertionError: largest error"),
        (lambda x: (x * 2, x), "AssertionError: 2 results, wanted 1"),
        (Peer(prepare=lambda x: 1 / 0), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_peer_that_fails_is_named_and_stops_nothing(
    peer: Any, message: str, enabled: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    measure(enabled, clock, CASE, Problem(args=(x,)), double, {"bad": peer, "good": double})
    peers = enabled.extra_info["peers"]
    assert peers["bad"]["error"].startswith(message)
    assert list(peers["bad"]) == ["error"]
    assert peers["good"] == {"us": 1000.0, "ratio": 1.0}


def test_without_timing_a_wrong_peer_fails_the_test(
    benchmark: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    assert benchmark.disabled
    with pytest.raises(AssertionError, match="largest error"):
        measure(benchmark, clock, CASE, Problem(args=(x,)), double, {"bad": lambda x: x * 3})
    assert benchmark.extra_info == {}
    benchmark(lambda: None)


def test_without_timing_a_peer_may_lack_the_case(
    benchmark: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    def prepare(_: Tensor) -> Run:
        raise UnsupportedError("no groups, got 8")

    measure(benchmark, clock, CASE, Problem(args=(x,)), double, {"other rule": Peer(prepare=prepare)})
    assert benchmark.extra_info == {}


def test_what_is_read_from_a_peer_is_compared_and_not_timed(
    enabled: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    def read(raw: Tensor) -> Tensor:
        clock.slowly()
        return raw[:8]

    peer = Peer(prepare=lambda x: Run(call=lambda: torch.cat([x, x]) * 2, read=read))
    measure(enabled, clock, CASE, Problem(args=(x,)), double, {"peer": peer})
    assert enabled.extra_info["peers"]["peer"] == {"us": 1000.0, "ratio": 1.0}


def test_the_backward_step_runs_the_forward_pass_once(x: Tensor) -> None:
    num_calls = 0

    def square(x: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return x * x

    problem = Problem(args=(x,), num_leaves=1, grads=(torch.full((8,), 3.0),))
    run = run_for(square, problem, "backward")
    for _ in range(3):
        torch.testing.assert_close(run()[0], 6 * x)
    assert num_calls == 1
    both = run_for(square, problem, "forward + backward")
    for _ in range(2):
        torch.testing.assert_close(both()[0], 6 * x)
    assert num_calls == 3
    assert not x.requires_grad


def test_results_without_gradients_take_none(x: Tensor) -> None:
    def largest(x: Tensor) -> tuple[Tensor, Tensor]:
        values, idx = x.max(dim=0)
        return idx, values

    problem = Problem(args=(x,), num_leaves=1, grads=(torch.tensor(2.0),))
    [grad] = run_for(largest, problem, "backward")()
    assert grad[x.argmax()] == 2.0
    assert int(grad.count_nonzero()) == 1


def test_a_copy_has_memory_of_its_own_in_handles_too(x: Tensor) -> None:
    handle = PermuteHandle(offsets_E=torch.tensor([1]), row_TK=torch.tensor([[0]]), token_M=torch.tensor([0]))
    problem = Problem(args=(x, handle, 3), kwargs={"scale": 2.0}, num_leaves=1, grads=(x,))
    copy = problem.copy()
    assert len(problem.tensors()) == len(copy.tensors()) == 5
    for mine, theirs in zip(copy.tensors(), problem.tensors(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert (copy.args[2], copy.kwargs, copy.num_leaves) == (3, {"scale": 2.0}, 1)


def test_what_is_shared_is_counted_and_not_copied(
    enabled: BenchmarkFixture, clock: MadeUpClock, x: Tensor
) -> None:
    weights = torch.ones(100)
    problem = Problem(args=(x,), shared=(weights,))
    assert problem.copy().shared[0] is weights
    measure(enabled, clock, CASE, problem, double, {})
    assert clock.num_bytes == x.nbytes * 2 + weights.nbytes


def test_integers_are_compared_bit_for_bit() -> None:
    wanted = (torch.tensor([5, 7]), torch.tensor([1.0, 2.0]))
    check_results((torch.tensor([5, 7]), torch.tensor([1.0, 2.0 + 1e-6])), wanted, torch.float32)
    with pytest.raises(AssertionError):
        check_results((torch.tensor([5, 8]), wanted[1]), wanted, torch.float32)
    with pytest.raises(AssertionError):
        check_results((wanted[0].int(), wanted[1]), wanted, torch.float32)


def test_floats_are_compared_as_the_inputs_were_rounded() -> None:
    wanted = torch.tensor([1.0, 2.0])
    check_results(wanted + 0.01, wanted, torch.bfloat16)
    with pytest.raises(AssertionError, match="largest error"):
        check_results(wanted + 0.01, wanted, torch.float32)
