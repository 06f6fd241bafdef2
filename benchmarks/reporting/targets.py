"""Measured against wanted: the targets of targets.json, and the accepted times of a device.

A target names the cases it is about: models, shapes and routings. The slowest decides, and it is met only
when all of them were measured.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.reporting.records import ACCEPTED, KEY, Key, Result, Run, key_of, read_json

TOLERANCE = 1.05  # a result that takes longer than this times its accepted time is flagged
TARGETS = Path(__file__).with_name("targets.json")

Case = tuple[str, str, str]  # model, shape, routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a step of an op must reach on a device, and what it should."""

    device: str
    op: str
    step: str
    unit: str  # us: less is better; GB/s, TFLOP/s, tokens/s, ratio: more is
    must: float
    aim: float
    cases: frozenset[Case]
    peers: tuple[str, ...] = ()  # of a ratio: the time of the quickest of these over ours

    @property
    def name(self) -> str:
        """As in `moe_gate forward T=8192`."""
        tokens = sorted({shape.partition(" ")[0] for _, shape, _ in self.cases})
        beside = f" beside {', '.join(self.peers)}" if self.peers else ""
        return f"{self.op} {self.step} {', '.join(tokens)}{beside}"

    def value(self, result: Result) -> float | None:
        """What `result` says in this target's unit, if it does."""
        if self.unit != "ratio":
            return result.get(self.unit)
        peers = {name: peer for name, peer in result.get("peers", {}).items() if name in self.peers}
        best = best_peer({"peers": peers})
        return None if best is None else best[1]

    def covers(self, result: Result) -> bool:
        """Whether `result` is one of those that this target is about; only kernels are held to it."""
        return (
            (self.device, self.op, self.step) == tuple(result.get(name) for name in ("device", "op", "step"))
            and case_of(result) in self.cases
            and bool(result.get("has_kernel"))
            and self.value(result) is not None
        )

    def verdict(self, value: float) -> str:
        """aim, must, or missed."""
        sign = 1 if self.unit == "us" else -1
        if sign * value <= sign * self.aim:
            return "aim met"
        return "must met" if sign * value <= sign * self.must else "missed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A target and the result that decides on it; None where there is none."""

    target: Target
    result: Result | None
    verdict: str


def case_of(result: Result) -> Case:
    """Which of a step's cases `result` is."""
    return (str(result.get("model", "")), str(result.get("shape", "")), str(result.get("routing", "")))


def place_of(result: Result) -> str:
    """Model and routing, as far as `result` has them."""
    return ", ".join(str(result[name]) for name in ("model", "routing") if name in result)


def read_targets(path: Path = TARGETS) -> list[Target]:
    """All targets."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return [
        Target(
            **{**entry, "cases": frozenset(_cases(entry["cases"])), "peers": tuple(entry.get("peers", ()))}
        )
        for entry in entries
    ]


def _cases(groups: Iterable[Mapping[str, Any]]) -> Iterator[Case]:
    for group in groups:
        for shape, routing in product(group["shapes"], group.get("routings", [""])):
            yield (group["model"], shape, routing)


def standings(targets: Iterable[Target], results: Iterable[Result], device: str) -> list[Standing]:
    """Each target of `device`, by its slowest result; one case can miss it, all of them together meet it."""
    results, found = list(results), []
    for target in targets:
        if target.device != device:
            continue
        covered = [result for result in results if target.covers(result)]
        pick = max if target.unit == "us" else min
        values = [(value, result) for result in covered if (value := target.value(result)) is not None]
        decisive = pick(values, key=lambda pair: pair[0], default=None)
        slowest = decisive[1] if decisive else None
        verdict = target.verdict(decisive[0]) if decisive else "not measured"
        num_measured = len({case_of(result) for result in covered})
        if slowest and verdict != "missed" and num_measured < len(target.cases):
            verdict = f"partly measured, {num_measured} of {len(target.cases)}"
        found.append(Standing(target=target, result=slowest, verdict=verdict))
    return found


def read_accepted(folder: Path) -> dict[Key, float]:
    """The accepted microseconds of a device; {} where nothing has been accepted yet."""
    return {key: float(entry["us"]) for key, entry in _entries(folder / ACCEPTED).items()}


def _entries(path: Path) -> dict[Key, Mapping[str, Any]]:
    if not path.exists():
        return {}
    stored = read_json(path)
    try:
        found = {key_of(entry): entry for entry in stored["accepted"]}
        wrong = [entry["us"] for entry in found.values() if not float(entry["us"]) > 0]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold accepted times, got what is none: {type(error).__name__} {error}"
        ) from error
    if wrong:
        raise ValueError(f"{path} must hold times greater than 0, got {wrong[0]}")
    return found


def accept(folder: Path, run: Run) -> int:
    """Make the times of `run` the accepted ones; what it did not measure stays. How many it set."""
    if any(counts.get(kind) for counts in run.tests.values() for kind in ("failed", "error", "crashed")):
        raise ValueError(f"--accept: {run.path} has tests that failed, its times are not accepted")
    if not run.results:
        raise ValueError(f"--accept: {run.path} has no results")
    path = folder / ACCEPTED
    kept = _entries(path)
    for result in run.results:
        names = {name: result[name] for name in KEY if name in result}
        kept[key_of(result)] = {**names, "us": result["us"], "day": run.day, "commit": run.commit}
    entries = ",\n".join(f"  {json.dumps(kept[key])}" for key in sorted(kept))
    path.write_text(
        f'{{"device": {json.dumps(run.machine["device"])}, "accepted": [\n{entries}\n]}}\n', encoding="utf-8"
    )
    return len(run.results)


def slower(results: Iterable[Result], accepted: Mapping[Key, float]) -> dict[Key, float]:
    """The results that take over 5 % longer than accepted, and how many times as long."""
    found = {}
    for result in results:
        key = key_of(result)
        if key in accepted and result["us"] > TOLERANCE * accepted[key]:
            found[key] = result["us"] / accepted[key]
    return found


def best_peer(result: Result) -> tuple[str, float] | None:
    """The peer that comes closest, or is furthest ahead, and its time over ours."""
    ratios = {name: peer["ratio"] for name, peer in result.get("peers", {}).items() if "ratio" in peer}
    name = min(ratios, key=lambda name: ratios[name], default=None)
    return None if name is None else (name, ratios[name])
