"""The stored runs below benchmarks/results/<device>: those of `make bench` and those of `make gpu-check`."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.check.record import FORMAT, KIND

RESULTS = Path("benchmarks/results")
ACCEPTED = "accepted.json"
CPU = "cpu"  # the folder of results without a GPU
MACHINE = ("device", "torch", "cuda", "driver", "python", "commit", "is_dirty")
FIGURES = ("us", "call_us", "tokens/s", "TFLOP/s", "GB/s", "share", "ceiling_TFLOP/s", "ceiling_GB/s")
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


def read_json(path: Path) -> Any:
    """What a file holds; ValueError naming it where that cannot be had."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read, got {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got {error}") from error


def read_run(path: Path) -> Run:
    """One file; ValueError naming it if it is no stored run."""
    stored = read_json(path)
    is_check = isinstance(stored, dict) and stored.get("kind") == KIND
    if not is_check and not (isinstance(stored, dict) and "machine_info" in stored):
        raise ValueError(f"{path} must be a run of pytest-benchmark or of gpu-check, got neither")
    kind = KIND if is_check else "pytest-benchmark"
    try:
        run = _check_run(path, stored) if is_check else _benchmark_run(path, stored)
        _check_kinds(run)
    except KeyError as error:
        raise ValueError(f"{path} must be a run of {kind}, got one without {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a run of {kind}, got one that is not whole: {error}") from error
    return run


def _check_kinds(run: Run) -> None:
    """ValueError, TypeError or AttributeError for what tables and plots could not show."""
    for name, value in (("started", run.started), ("commit", run.machine.get("commit") or "")):
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
    str(run.machine["device"])
    for result in run.results:
        for name in ("op", "step", "shape"):
            if not isinstance(result[name], str):
                raise ValueError(f"{name} must be text, got {result[name]!r}")
        for name in FIGURES:
            if name in result:
                _check_positive(name, result[name])
        for name, peer in result.get("peers", {}).items():
            if "error" not in peer:
                _check_positive(f"{name}'s ratio", peer["ratio"])
    for counts in run.tests.values():
        for kind, number in counts.items():
            if not isinstance(number, int):
                raise ValueError(f"the number of {kind} tests must be an integer, got {number!r}")
    for tools in run.sanitizers.values():
        for tool in tools.values():
            str(tool["outcome"])


def _check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a number greater than 0, got {value!r}")


def read_folder(folder: Path) -> tuple[list[Run], list[str]]:
    """Every run of one device, the oldest first; of each file that is none, what is wrong with it."""
    runs, problems = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name == ACCEPTED:
            continue
        try:
            runs.append(read_run(path))
        except ValueError as error:
            problems.append(str(error))
    return sorted(runs, key=lambda run: run.started), problems


def read_runs(folder: Path) -> list[Run]:
    """The runs of `read_folder`."""
    return read_folder(folder)[0]


def devices(root: Path) -> list[Path]:
    """The folders of devices with files of runs in them."""
    folders = [folder for folder in root.glob("*") if folder.is_dir()]
    return sorted(one for one in folders if any(path.name != ACCEPTED for path in one.glob("*.json")))


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
    if stored.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {stored.get('format')!r}")
    return Run(
        path=path,
        started=stored["started"],
        machine={name: stored.get(name) for name in MACHINE},
        results=[record for record in stored["benchmarks"] if is_result(record)],
        is_check=True,
        is_complete=stored["is_complete"],
        tests=stored["tests"],
        sanitizers=stored["sanitizers"],
    )


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
