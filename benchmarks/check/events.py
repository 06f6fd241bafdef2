"""What the lines of benchmarks.check.plugin say, whole or cut short."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The tests of one run of pytest."""

    counts: dict[str, int] = field(default_factory=dict)  # passed, failed, error, skipped, crashed
    failures: list[dict[str, str]] = field(default_factory=list)  # test and reason
    measured: list[dict[str, Any]] = field(default_factory=list)  # what benchmarks stored, with their test
    skips: dict[str, int] = field(default_factory=dict)  # reason: how often
    num_collected: int = 0
    is_finished: bool = False

    @property
    def num_bad(self) -> int:
        """Tests that failed, could not run, or took the process down."""
        return sum(self.counts.get(kind, 0) for kind in ("failed", "error", "crashed"))


def read_events(path: Path, *, is_stopped: bool) -> Seen:
    """Read the events in `path`; a test that started and never ended crashed, unless the run `is_stopped`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = [event for line in lines if (event := _parse(line))]
    ended = [event for event in events if "test" in event]
    names = {event["test"] for event in ended}
    open_tests = [event["started"] for event in events if event.get("started", "") not in {"", *names}]
    counts = Counter(event["outcome"] for event in ended)
    failures = [
        {"test": event["test"], "reason": event.get("reason", "")}
        for event in ended
        if event["outcome"] in ("failed", "error")
    ]
    if open_tests and not is_stopped:
        counts["crashed"] += len(open_tests)
        failures += [{"test": name, "reason": "the process ended inside this test"} for name in open_tests]
    return Seen(
        counts=dict(counts),
        failures=failures,
        measured=[{"test": event["test"], **event["info"]} for event in ended if "info" in event],
        skips=dict(Counter(event.get("reason", "") for event in ended if event["outcome"] == "skipped")),
        num_collected=max((event["collected"] for event in events if "collected" in event), default=0),
        is_finished=any("finished" in event for event in events),
    )


def _parse(line: str) -> dict[str, Any]:
    """One event; {} for a line that was cut in the middle."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
