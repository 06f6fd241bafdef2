"""The JSON of one check, on disk from the first step on: a run that is killed leaves what it had done."""

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

KIND = "gpu-check"
FORMAT = 1


class Record:
    """What is known so far; every change is written at once, to each of `paths`."""

    def __init__(
        self,
        paths: Sequence[Path],
        machine: Mapping[str, Any],
        *,
        ops: Sequence[str],
        begin: datetime,
        announce: Callable[[str], object],
    ) -> None:
        self._paths = tuple(paths)
        self._announce = announce  # called with a line when a step has ended
        self._lock = threading.Lock()
        self.data: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "started": begin.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "is_complete": False,
            "missing": ["the check did not come to its end"],
            "seconds": 0.0,
            **machine,
            "ops": list(ops),
            "steps": [],
            "tests": {},
            "failures": [],
            "sanitizers": {},
            "benchmarks": [],
        }
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._save()

    def add_step(self, name: str, outcome: str, seconds: float, note: str = "") -> None:
        """One step, or one part of it."""
        step = {"name": name, "outcome": outcome, "seconds": round(seconds, 1)}
        with self._lock:
            self.data["steps"].append({**step, "note": note} if note else step)
            self._save()
        self._announce(f"{name}: {outcome}, {seconds:.1f} s\n")

    def add_tests(self, op: str, counts: Mapping[str, int], failures: Sequence[Mapping[str, str]]) -> None:
        """The counts of one op's tests by outcome, and what failed."""
        with self._lock:
            self.data["tests"][op] = dict(counts)
            self.data["failures"] += [dict(failure) for failure in failures]
            self._save()

    def add_sanitizer(self, op: str, tool: str, verdict: Mapping[str, Any]) -> None:
        """What one tool found in one op."""
        with self._lock:
            self.data["sanitizers"].setdefault(op, {})[tool] = dict(verdict)
            self._save()

    def add_benchmarks(self, results: Sequence[Mapping[str, Any]]) -> None:
        """What benchmarks stored, each with its test's name; a later result of a test replaces an earlier."""
        with self._lock:
            kept = {result["test"]: result for result in [*self.data["benchmarks"], *map(dict, results)]}
            self.data["benchmarks"] = list(kept.values())
            self._save()

    def end(self, seconds: float, missing: Sequence[str]) -> None:
        """The last write; `missing` says what was not shown, and nothing if all was."""
        with self._lock:
            self.data.update(seconds=round(seconds, 1), is_complete=not missing, missing=list(missing))
            self._save()

    def _save(self) -> None:
        text = json.dumps(self.data, indent=1) + "\n"
        for path in self._paths:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
