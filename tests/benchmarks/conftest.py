"""Records as runs leave them, with figures that a reader can follow; machines for a check to run on."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.stand_in import Machine, make_stand_in

MACHINE = {
    "device": "NVIDIA H200",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "driver": "580.1",
    "python": "3.12.3",
    "commit": "0123456789abcdef",
    "is_dirty": False,
}


def result(op: str = "moe_gate", **changes: Any) -> dict[str, Any]:
    """One result; 20 % of the copy's bandwidth, twice as fast as torch."""
    return {
        "op": op,
        "step": "forward",
        "model": "v2",
        "routing": "uniform",
        "shape": "T=8192 E=160 K=6 G=8/3",
        "dtype": "float32",
        "device": "NVIDIA H200",
        "method": "graph",
        "us": 7.0,
        "call_us": 12.0,
        "GB/s": 860.0,
        "share": 20.0,
        "bound": "memory",
        "ceiling_TFLOP/s": 780.0,
        "ceiling_GB/s": 4300.0,
        "has_kernel": True,
        "peers": {"torch": {"us": 14.0, "ratio": 2.0}, "vllm": {"error": "ImportError: no vllm"}},
        **changes,
    }


@pytest.fixture
def make_result() -> Callable[..., dict[str, Any]]:
    return result


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Writes one record below tmp_path/benchmarks/results and gives its path."""

    def store_check(started: str, *results: dict[str, Any], **changes: Any) -> Path:
        folder = tmp_path / "benchmarks" / "results" / "nvidia_h200"
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "kind": "gpu-check",
            "format": 1,
            "started": started,
            "is_complete": True,
            "missing": [],
            "seconds": 400.0,
            **MACHINE,
            "ops": ["moe_gate"],
            "steps": [{"name": "tests moe_gate", "outcome": "passed", "seconds": 30.0}],
            "tests": {"moe_gate": {"passed": 151, "skipped": 1}},
            "failures": [],
            "sanitizers": {
                "moe_gate": {tool: {"outcome": "passed"} for tool in ("memcheck", "synccheck", "racecheck")}
            },
            "benchmarks": [{"test": "benchmarks/bench_moe_gate.py::test", **one} for one in results],
            **changes,
        }
        path = folder / f"{started.removesuffix('Z').replace(':', '-')}.json"
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    return store_check


@pytest.fixture
def make_machine(tmp_path: Path) -> Callable[..., Machine]:
    """See `make_stand_in`."""
    return functools.partial(make_stand_in, tmp_path)
