"""The stored runs below benchmarks/results/<device>: those of `make bench` and those of `make gpu-check`."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
ACCEPTED = "accepted.json"
CPU = "cpu"  # the folder of results without a GPU
KEY = ("op", "step", "model", "routing", "shape", "dtype")  # what tells one result from another

Key = tuple[str, ...]
Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One stored run, of either kind."""

    path: Path
    started: str  # 2026-11-20T12:00:00Z
    machine: Mapping[str, Any]  # device, torch, cuda, driver, python, commit, is_dirty
    results: Sequence[Result]  # the records of docs/benchmarks.md, with their "test"
    is_check: bool = False
    is_complete: bool = True
    tests: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sanitizers: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def day(self) -> str:
        """When it began, as in 2026-11-20."""
        return self.started[:10]

    @property
    def commit(self) -> str:
        """Short; marked where the tree had changes of its own."""
        commit = self.machine.get("commit")
        return (
            f"{commit[:9]}{' with changes' if self.machine.get('is_dirty') else ''}" if commit else "unknown"
        )


def device_folder(device: str) -> str:
    """The folder of a device below benchmarks/results, such as nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def run_file(root: Path, device: str, begin: datetime) -> Path:
    """The file of a run that began at `begin`, such as nvidia_h200/2026-11-20T11-30-00.json."""
    return root / device_folder(device) / f"{begin.astimezone(UTC):%Y-%m-%dT%H-%M-%S}.json"


def key_of(result: Result) -> Key:
    """What a result is the time of."""
    return tuple(str(result.get(name, "")) for name in KEY)


def read_run(path: Path) -> Run:
    """One file; ValueError naming it if it is no stored run."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got {error}") from error
    if isinstance(stored, dict) and stored.get("kind") == "gpu-check":
        return _check_run(path, stored)
    if isinstance(stored, dict) and "machine_info" in stored:
        return _benchmark_run(path, stored)
    raise ValueError(f"{path} must be a run of pytest-benchmark or of gpu-check, got neither")


def read_runs(folder: Path) -> list[Run]:
    """Every run of one device, the oldest first."""
    paths = [path for path in folder.glob("*.json") if path.name != ACCEPTED]
    return sorted((read_run(path) for path in paths), key=lambda run: run.started)


def devices(root: Path) -> list[Path]:
    """The folders of devices with runs in them."""
    return sorted(folder for folder in root.glob("*") if folder.is_dir() and read_runs(folder))


def newest_results(runs: Iterable[Run]) -> dict[Key, tuple[Result, Run]]:
    """The newest result of each kind and its run; a run that was cut short replaces what it has."""
    newest = {}
    for run in runs:
        for result in run.results:
            newest[key_of(result)] = (result, run)
    return newest


def is_result(record: Result) -> bool:
    """Whether a benchmark measured an op; some measure text or data and have no such record."""
    return "op" in record and "us" in record


def _check_run(path: Path, stored: Mapping[str, Any]) -> Run:
    names = ("device", "torch", "cuda", "driver", "python", "commit", "is_dirty")
    try:
        return Run(
            path=path,
            started=stored["started"],
            machine={name: stored.get(name) for name in names},
            results=[record for record in stored["benchmarks"] if is_result(record)],
            is_check=True,
            is_complete=stored["is_complete"],
            tests=stored["tests"],
            sanitizers=stored["sanitizers"],
        )
    except KeyError as error:
        raise ValueError(f"{path} must be a record of gpu-check, got one without {error}") from error


def _benchmark_run(path: Path, stored: Mapping[str, Any]) -> Run:
    benchmarks = stored.get("benchmarks", [])
    return Run(
        path=path,
        started=_started(path, stored),
        machine=stored["machine_info"],
        results=[
            {"test": benchmark.get("fullname", ""), **benchmark["extra_info"]}
            for benchmark in benchmarks
            if is_result(benchmark.get("extra_info", {}))
        ],
    )


def _started(path: Path, stored: Mapping[str, Any]) -> str:
    """The time in the name that `run_file` gives a run; else the one pytest-benchmark wrote."""
    day, _, time = path.stem.partition("T")
    if len(day) == 10 and len(time) == 8:
        return f"{day}T{time.replace('-', ':')}Z"
    return str(stored.get("datetime", ""))[:19] + "Z"
