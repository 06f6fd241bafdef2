"""benchmarks/bench_expert_parallel.py on the host executor: its peers give what the kernels give."""

import functools
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks import bench_expert_parallel as bench
from benchmarks.shapes import ExpertLayer
from dscoder.runtime import native
from dscoder.testing.measure import measure
from dscoder.testing.timing import WallClock

LAYERS = {
    "plain": ExpertLayer(width=8, expert_width=8, num_experts=8, num_topk=3),
    "grouped": ExpertLayer(
        width=16, expert_width=8, num_experts=16, num_topk=3, num_groups=4, num_groups_kept=2
    ),
}


@pytest.mark.parametrize("step", bench.STEPS)
@pytest.mark.parametrize(("model", "num_ranks"), [("plain", 2), ("grouped", 4), ("plain", 1)])
def test_all_contenders_agree(
    model: str,
    num_ranks: int,
    step: str,
    host_ops: ModuleType,
    host_kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_kernels.set_order(num_ranks)
    monkeypatch.setattr(native, "_C", host_ops)
    monkeypatch.setattr(bench, "LAYERS", LAYERS)
    ran: list[object] = []
    benchmark = SimpleNamespace(disabled=True, extra_info={}, pedantic=ran.append)
    bench.test_step(functools.partial(measure, benchmark, WallClock()), benchmark, model, num_ranks, 11, step)
    assert len(ran) == 1
    info = benchmark.extra_info
    assert 0 <= info["remote_bytes"] <= info["logical_bytes"]
    assert (info["remote_bytes"] == 0) == (num_ranks == 1)


def test_traffic_is_counted_by_bytes_moved() -> None:
    """Two tokens, one of which goes to two ranks: three rows of 10 bytes leave, one stays at home."""
    traffic = bench.Traffic(num_tokens=2, num_pairs=3, num_own_pairs=1)
    assert traffic.moved(10) == 10 * (2 + 3 * 3)
    assert traffic.figures(10, 2e-9) == {
        **{"logical_bytes": 30, "remote_bytes": 20},
        **{"logical_GB/s": 15.0, "remote_GB/s": 10.0},
    }
    assert traffic.figures(10, None) == {"logical_bytes": 30, "remote_bytes": 20}
