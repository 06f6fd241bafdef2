"""A pytest plugin that writes each test's outcome as a line of JSON the moment it is known.

A run that is killed, or that a kernel takes down with it, leaves what it had done and the name of the test it
was in. `--check-tool` keeps the tests that are marked for one tool of compute-sanitizer; `--check-ours` tells
benchmarks/conftest.py to leave the peers out.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MAX_REASON = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    """All of them are for benchmarks.gpu_check alone."""
    parser.addoption("--check-events", type=Path, help="the file that outcomes are appended to")
    parser.addoption("--check-tool", help="keep the tests marked sanitize(), or sanitize(TOOL, ...)")
    parser.addoption("--check-ours", action="store_true", help="time our ops alone")


def pytest_configure(config: pytest.Config) -> None:
    """Listen if there is a file to write to."""
    path = config.getoption("--check-events")
    if path is not None:
        config.pluginmanager.register(Events(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what is not marked for the tool."""
    tool = config.getoption("--check-tool")
    if tool is None:
        return
    kept = []
    for item in items:
        mark = item.get_closest_marker("sanitize")
        if mark is not None and (not mark.args or tool in mark.args):
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class Events:
    """One line when a test starts and one when it has ended, torn down too; one when the run has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, dict[str, Any]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many tests there are to run."""
        self._write({"collected": len(session.items)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """What a run that ends without a word was in."""
        self._outcomes[nodeid] = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        self._write({"started": nodeid})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Gather setup, call and teardown into one outcome; write it after the last."""
        report = yield
        outcome = self._outcomes[item.nodeid]
        outcome["seconds"] = round(outcome["seconds"] + report.duration, 3)
        if report.skipped:
            where = report.longrepr  # file, line and reason
            outcome.update(
                outcome="skipped", reason=where[2] if isinstance(where, tuple) else report.longreprtext
            )
        if report.failed:
            outcome.update(outcome="failed" if call.when == "call" else "error", reason=_reason(report))
        if call.when == "teardown":
            benchmark = getattr(item, "funcargs", {}).get("benchmark")
            if benchmark is not None and benchmark.extra_info:
                outcome["info"] = dict(benchmark.extra_info)
            self._write(outcome)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as one error."""
        if report.failed:
            reason = _reason(report)
            self._write({"test": report.nodeid, "outcome": "error", "seconds": 0.0, "reason": reason})

    def pytest_sessionfinish(self) -> None:
        """Nothing was cut short."""
        self._write({"finished": True})

    def _write(self, event: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, default=str) + "\n")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (errors[0] if errors else lines[-1] if lines else "")[:MAX_REASON]
