"""Stored runs read back, held to targets and to accepted times."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import result_file
from benchmarks.reporting.records import devices, key_of, newest_results, read_run, read_runs, run_file
from benchmarks.reporting.targets import (
    Target,
    accept,
    best_peer,
    place_of,
    read_accepted,
    read_targets,
    slower,
    standings,
)
from dscoder.runtime import native

Make = Callable[..., dict[str, Any]]
Store = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
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


def every_case(make_result: Make, place: int, **figures: Any) -> list[dict[str, Any]]:
    """A result for each case of one target."""
    target = read_targets()[place]
    names = {"op": target.op, "step": target.step}
    return [
        make_result(**names, model=model, shape=shape, routing=routing, **figures)
        for model, shape, routing in sorted(target.cases)
    ]


GATE, PERMUTE = 0, 3  # forward; their places among the targets
ONE_ROW = "B=1 context=1024"


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    return {one.target.name: one.verdict for one in standings(read_targets(), results, "NVIDIA H200")}


@pytest.mark.parametrize(
    ("us", "verdict"), [(3.5, "aim met"), (3.6, "must met"), (8.0, "must met"), (8.1, "missed")]
)
def test_less_time_is_better(make_result: Make, us: float, verdict: str) -> None:
    assert verdicts(every_case(make_result, GATE, us=us))["moe_gate forward T=8192"] == verdict


@pytest.mark.parametrize(("speed", "verdict"), [(3900, "aim met"), (2800, "must met"), (2799, "missed")])
def test_more_bandwidth_is_better(make_result: Make, speed: float, verdict: str) -> None:
    results = every_case(make_result, PERMUTE, **{"GB/s": speed})
    assert verdicts(results)["moe_permute forward T=8192"] == verdict


@pytest.mark.parametrize(
    ("tokens_per_second", "verdict"),
    [(500, "aim met"), (499, "must met"), (250, "must met"), (249, "missed")],
)
def test_more_tokens_are_better(make_result: Make, tokens_per_second: float, verdict: str) -> None:
    result = make_result("decode_step", **{"tokens/s": tokens_per_second}, model="v2_lite", shape=ONE_ROW)
    del result["routing"]
    found = verdicts([result])
    assert found["decode_step forward B=1"] == verdict
    assert found["decode_step forward B=128"] == "not measured"
    assert place_of(result) == "v2_lite"


@pytest.mark.parametrize("num_missing", [1, 7])
def test_what_was_not_measured_keeps_a_target_from_being_met(make_result: Make, num_missing: int) -> None:
    results = every_case(make_result, GATE, us=3.0)[num_missing:]
    assert verdicts(results)["moe_gate forward T=8192"] == f"partly measured, {8 - num_missing} of 8"


def test_the_same_case_twice_counts_once(make_result: Make) -> None:
    results = every_case(make_result, GATE, us=3.0)[1:]
    assert verdicts([*results, *results])["moe_gate forward T=8192"] == "partly measured, 7 of 8"


def test_one_case_that_misses_is_enough(make_result: Make) -> None:
    assert verdicts([make_result(us=8.1)])["moe_gate forward T=8192"] == "missed"


def test_the_slowest_result_decides(make_result: Make) -> None:
    results = [
        make_result(us=3.0),
        make_result(us=9.0, routing="one_hot"),
        make_result(us=5.0, model="v2_lite", shape="T=8192 E=64 K=6"),
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


# What the benchmarks measure on a GPU, asked of them on a machine that has none.
LISTED = """
import json, torch
from dscoder.testing import results
results.measured_device = lambda: torch.device("cuda")
from benchmarks import bench_decode_step as decode, bench_grouped_gemm as gemm
from benchmarks import bench_latent_append as append, bench_latent_rope as latent_rope, bench_rope as rope
from benchmarks import bench_mla_decode as latent, bench_moe_experts as experts, shapes
from benchmarks import bench_mla_prefill as prefill, bench_model, bench_expert_parallel as exchange
def text(model, num_tokens, columns, depth):
    return f"T={num_tokens} N={columns} K={depth} E={gemm.MODELS[model][0]}"
found = {"grouped_gemm forward": [], "grouped_gemm input gradient": [], "grouped_gemm weight gradient": []}
for model, num_tokens, routing, i in gemm.forward_cases():
    sizes = gemm.MODELS[model][2 + i]
    found["grouped_gemm forward"].append((model, text(model, num_tokens, *sizes), routing))
for model, i in gemm.GRADIENTS:
    sizes = gemm.MODELS[model][2 + i]
    found["grouped_gemm input gradient"].append((model, text(model, gemm.LARGE, *sizes[::-1]), "uniform"))
    found["grouped_gemm weight gradient"].append((model, text(model, gemm.LARGE, *sizes), "uniform"))
for step in ("forward", "backward"):
    cases = [(model, prefill.shape_of(model), "") for model in prefill.SHAPES]
    found[f"mla_prefill {step}"] = cases
for step in exchange.STEPS:
    found[f"expert_parallel {step}"] = [(case[0], exchange.shape_of(*case), "") for case in exchange.CASES]
for step in ("training step", "whole step"):
    cases = [(name, bench_model.shape_of(name), "") for name in bench_model.STEPS]
    found[f"training_step {step}"] = cases
for model, num_tokens, routing, step in experts.CASES:
    width, expert_width, num_experts, num_topk = experts.SHAPES[model]
    shape = f"T={num_tokens} D={width} F={expert_width} E={num_experts} K={num_topk}"
    found.setdefault(f"moe_experts {step}", []).append((model, shape, routing))
for op, step, width in (
    ("moe_gate", "forward", False), ("moe_gate", "backward", False), ("moe_permute", "maps", False),
    ("moe_permute", "forward", True), ("moe_permute", "backward", True),
    ("moe_unpermute", "forward", True), ("moe_unpermute", "backward", True),
):
    found[f"{op} {step}"] = [
        (model, shapes.LAYERS[model].shape(num_tokens, width=width), routing)
        for model, num_tokens, routing, _ in shapes.routed_cases(step)
    ]
found["mla_decode forward"] = [(call[0], latent.shape_of(*call), "") for call in latent.CALLS]
found["mla_decode plan and forward"] = [(call[0], latent.shape_of(*call), "") for call in latent.SHORT]
found["decode_step forward"] = [
    (model, f"B={num_rows} context={decode.CONTEXT}", "") for model, num_rows in decode.CASES
]
found["rope forward"] = [
    (model, f"T={rope.NUM_TOKENS} H={num_heads}/{num_key_heads} r={width}", "")
    for model, (num_heads, num_key_heads, width, _) in rope.SHAPES.items()
]
for step in ("forward", "backward"):
    found[f"latent_rope {step}"] = [
        (
            model,
            f"T={shapes.TOKENS} H={num_heads} d={latent_rope.NOPE + latent_rope.ROPE}"
            f" C={latent_rope.LATENT} r={latent_rope.ROPE}",
            "",
        )
        for model, num_heads in latent_rope.HEADS.items()
    ]
found["latent_append forward"] = [
    (model, f"T={shapes.TOKENS} H={num_heads} C={append.LATENT} r={append.ROPE}", "")
    for model, num_heads in append.HEADS.items()
]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("ratios", "value", "verdict"),
    [
        ({"torch": 2.5, "transformers eager": 2.0, "other": 0.1}, 2.0, "aim met"),
        ({"torch": 1.3}, 1.3, "must met"),
        ({"torch": 9.0, "transformers grouped_mm": 1.2}, 1.2, "missed"),
        ({"other": 9.0}, None, "not measured"),
    ],
)
def test_a_ratio_is_to_the_quickest_of_the_peers_it_names(
    ratios: dict[str, float], value: float | None, verdict: str, make_result: Make
) -> None:
    peers = {name: {"us": 1.0, "ratio": ratio} for name, ratio in ratios.items()}
    names = {"op": "moe_experts", "step": "forward + backward", "model": "v2_lite"}
    result = make_result(**names, shape="T=8192 D=2048 F=1408 E=64 K=6", peers=peers)
    (target,) = [target for target in read_targets() if target.op == "moe_experts"]
    assert target.value(result) == value
    assert verdicts([result])[target.name] == verdict


def test_every_case_of_a_target_is_measured() -> None:
    command = [sys.executable, "-c", LISTED]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    measured = {name: {tuple(case) for case in found} for name, found in json.loads(said).items()}
    for target in read_targets():
        assert target.cases <= measured[f"{target.op} {target.step}"], target.name


def test_every_target_is_one_of_an_op_and_can_be_met() -> None:
    targets = read_targets()
    others = {"moe_permute", "moe_unpermute", "decode_step", "training_step"}
    assert {target.op for target in targets} <= native.kernel_ops() | others
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


def test_a_run_is_named_by_its_device_and_its_time_in_utc() -> None:
    noon = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
    path = run_file(Path("r"), "NVIDIA H200 (141 GB)", noon)
    assert path == Path("r/nvidia_h200_141_gb/2026-11-20T12-00-00.json")
    assert run_file(Path("r"), "NVIDIA H200 (141 GB)", noon.astimezone(timezone(timedelta(hours=8)))) == path


def test_runs_on_cpus_share_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result_file, "measured_device", lambda: torch.device("cpu"))
    path = result_file.main(tmp_path)
    assert path.parent == tmp_path / "cpu"
    assert not path.parent.exists()
