"""Stored runs read back, held to targets and to accepted times."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.check.record import device_folder
from benchmarks.reporting.records import devices, key_of, newest_results, read_run, read_runs
from benchmarks.reporting.targets import (
    Target,
    accept,
    best_peer,
    read_accepted,
    read_targets,
    slower,
    standings,
)
from dscoder.runtime import native

Make = Callable[..., dict[str, Any]]
Store = Callable[..., Path]
NOON, ONE, TWO = (f"2026-11-20T{hour}:00:00Z" for hour in (12, 13, 14))


def test_a_check_and_a_benchmark_run_read_alike(make_result: Make, store: Store) -> None:
    checked = read_run(store(NOON, make_result()))
    path = checked.path.with_name("2026-11-20T13-00-00.json")
    benchmarks = [
        {"fullname": "benchmarks/bench_moe_gate.py::test", "extra_info": make_result(), "stats": {}},
        {"fullname": "benchmarks/bench_fim.py::test", "extra_info": {"MB/s": 3.0}, "stats": {}},
    ]
    machine = {**checked.machine, "cpu": {}}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}), encoding="utf-8")
    plain = read_run(path)
    assert [dict(one) for one in plain.results] == [dict(one) for one in checked.results]
    assert plain.started == ONE
    assert (plain.day, plain.commit) == ("2026-11-20", "012345678")
    assert checked.is_check
    assert not plain.is_check


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "other"}', '{"kind": "gpu-check"}'])
def test_another_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json must "):
        read_run(path)


def test_each_result_is_the_newest_of_its_kind(make_result: Make, store: Store) -> None:
    backward = make_result(step="backward", us=9.0)
    runs = [read_run(store(NOON, make_result(us=8.0), backward)), read_run(store(ONE, make_result(us=7.0)))]
    newest = newest_results(runs)
    assert {key[1]: (one["us"], run.started) for key, (one, run) in newest.items()} == {
        "forward": (7.0, ONE),
        "backward": (9.0, NOON),
    }


def test_runs_are_sorted_by_time_and_accepted_times_are_none(make_result: Make, store: Store) -> None:
    later, sooner = store(TWO, make_result()), store(NOON, make_result())
    (later.parent / "accepted.json").write_text('{"accepted": []}', encoding="utf-8")
    assert [run.path for run in read_runs(later.parent)] == [sooner, later]
    assert devices(later.parent.parent) == [later.parent]


@pytest.mark.parametrize(
    ("us", "verdict"), [(3.5, "aim met"), (3.6, "must met"), (8.0, "must met"), (8.1, "missed")]
)
def test_less_time_is_better(make_result: Make, us: float, verdict: str) -> None:
    (gate, *_) = standings(read_targets(), [make_result(us=us)], "NVIDIA H200")
    assert (gate.target.op, gate.target.step, gate.verdict) == ("moe_gate", "forward", verdict)


@pytest.mark.parametrize(("speed", "verdict"), [(3900, "aim met"), (2800, "must met"), (2799, "missed")])
def test_more_bandwidth_is_better(make_result: Make, speed: float, verdict: str) -> None:
    results = [make_result("moe_permute", **{"GB/s": speed, "shape": "T=8192 D=2048 E=64 K=6"})]
    found = standings(read_targets(), results, "NVIDIA H200")
    assert [one.verdict for one in found if one.result] == [verdict]


def test_the_slowest_result_decides(make_result: Make) -> None:
    results = [
        make_result(us=3.0),
        make_result(us=9.0, routing="one_hot"),
        make_result(us=5.0, model="v2_lite"),
    ]
    (gate, *_) = standings(read_targets(), results, "NVIDIA H200")
    assert gate.result is not None
    assert (gate.result["us"], gate.verdict) == (9.0, "missed")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "T=128 E=160"},
        {"shape": "T=81920 E=160"},
        {"has_kernel": False},
        {"device": "NVIDIA H100"},
        {"step": "forward + backward"},
    ],
)
def test_a_target_is_about_its_own_case_alone(make_result: Make, changes: dict[str, Any]) -> None:
    found = standings(read_targets(), [make_result(us=1.0, **changes)], "NVIDIA H200")
    assert {one.verdict for one in found} == {"not measured"}


def test_every_target_is_one_of_an_op_and_can_be_met() -> None:
    targets = read_targets()
    assert {target.op for target in targets} <= native.kernel_ops() | {"moe_permute", "moe_unpermute"}
    for target in targets:
        assert target.verdict(target.aim) == "aim met"
        assert target.verdict(target.must) == "must met"
        assert isinstance(target, Target)


def test_accepted_times_stay_where_a_run_did_not_measure(make_result: Make, store: Store) -> None:
    forward, backward = make_result(), make_result(step="backward", us=20.0)
    first = read_run(store(NOON, forward, backward))
    folder = first.path.parent
    assert accept(folder, first) == 2
    assert accept(folder, read_run(store(ONE, make_result(us=6.0)))) == 1
    assert read_accepted(folder) == {key_of(forward): 6.0, key_of(backward): 20.0}


def test_over_five_percent_slower_is_flagged(make_result: Make) -> None:
    accepted = {key_of(make_result()): 10.0}
    assert slower([make_result(us=10.5)], accepted) == {}
    assert slower([make_result(us=10.6)], accepted) == {key_of(make_result()): 1.06}
    assert slower([make_result(us=99.0, routing="one_hot")], accepted) == {}


def test_a_run_with_failed_tests_is_not_accepted(make_result: Make, store: Store) -> None:
    run = read_run(store(NOON, make_result(), tests={"moe_gate": {"passed": 3, "failed": 1}}))
    with pytest.raises(ValueError, match="has tests that failed"):
        accept(run.path.parent, run)
    assert read_accepted(run.path.parent) == {}


def test_the_best_peer_is_the_quickest(make_result: Make) -> None:
    peers = {"a": {"us": 1.0, "ratio": 3.0}, "b": {"us": 1.0, "ratio": 0.9}, "c": {"error": "no"}}
    assert best_peer(make_result(peers=peers)) == ("b", 0.9)
    assert best_peer(make_result(peers={})) is None


def test_folders_of_devices_are_plain_names() -> None:
    assert device_folder("NVIDIA H200 (141 GB)") == "nvidia_h200_141_gb"
