"""Rates: assumed ones from data sheets, measured ones from the records of a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from dscoder.config.plan import GPUS
from dscoder.train.plan.rates import ASSUMED, MEASURED, assumed_rates, measured_rates, read_records

H800 = assumed_rates(GPUS["h800"], node_network=400e9, gpus_per_node=8)


def record(**fields: Any) -> dict[str, Any]:
    return {
        "op": "moe_experts",
        "step": "forward + backward",
        "model": "v2",
        "shape": "T=8192",
        "dtype": "bfloat16",
        "us": 10.0,
        "TFLOP/s": 400.0,
        "ceiling_TFLOP/s": 700.0,
        "ceiling_GB/s": 3000.0,
        "has_kernel": True,
        **fields,
    }


def test_assumed_rates_are_shares_of_the_data_sheet() -> None:
    assert H800.product.value == pytest.approx(0.65 * 989e12)
    assert H800.network.value == pytest.approx(0.85 * 50e9)
    assert {rate.basis for _, rate in H800.by_name()} == {ASSUMED}
    assert H800.link.source == "0.8 of 2e+11 per second"
    assert H800.basis == ASSUMED


def test_records_replace_what_they_measure_and_nothing_else() -> None:
    found = measured_rates(H800, [record()], model="v2", source="run.json")
    assert (found.experts.value, found.experts.basis) == (400e12, MEASURED)
    assert found.experts.source == "moe_experts forward + backward, v2, in run.json"
    assert (found.product.value, found.bandwidth.value) == (700e12, 3000e9)
    assert found.attention_forward == H800.attention_forward
    assert found.link == H800.link
    assert found.basis == ASSUMED


def test_all_of_them_measured_is_said() -> None:
    rate = measured_rates(H800, [record()], model="v2", source="run.json").experts
    names = [name for name, _ in H800.by_name()]
    assert type(H800)(**dict.fromkeys(names, rate)).basis == "from measured rates"


@pytest.mark.parametrize(
    "fields",
    [{"model": "v2_lite"}, {"step": "forward"}, {"dtype": "float32"}, {"has_kernel": False}],
    ids=lambda fields: next(iter(fields)),
)
def test_other_models_steps_types_and_references_do_not_count(fields: dict[str, Any]) -> None:
    assert measured_rates(H800, [record(**fields)], model="v2", source="").experts == H800.experts


def test_the_quickest_record_counts() -> None:
    records = [record(), record(**{"TFLOP/s": 500.0}), record(**{"TFLOP/s": 450.0})]
    assert measured_rates(H800, records, model="v2", source="").experts.value == 500e12


@pytest.mark.parametrize("is_check", [True, False], ids=["gpu-check", "bench"])
def test_both_kinds_of_stored_runs_are_read(is_check: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    no_op = {"seconds": 1.0}
    benchmarks = [record(), no_op] if is_check else [{"extra_info": record()}, {"extra_info": no_op}]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    assert read_records(path) == [record()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "rates must hold JSON, got .*run.json: Expecting property name"),
        ("[]", "rates must be a stored run of benchmarks, got .*run.json without any"),
        ('{"benchmarks": 3}', "rates must be a stored run of benchmarks, got .*run.json without any"),
        (None, "rates must be a file that can be read, got .*run.json: No such file or directory"),
    ],
)
def test_a_file_that_is_none_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(path)
